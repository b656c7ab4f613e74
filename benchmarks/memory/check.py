"""The count of ``benchmarks.memory`` beside what a real step of a real model takes on this CPU.

PyTorch's profiler sees every block that the CPU allocator hands out and takes back, the temporaries
inside of operators included. The count, made with fake tensors from the model's configuration, does
not know that the measurement exists.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness.memory import allocated
from benchmarks.memory.count import batch_of, checkpoint_blocks, count, first_step
from benchmarks.memory.kept import saved_bytes
from benchmarks.memory.live_bytes import Bytes, bytes_of
from benchmarks.memory.rows import without_mask
from benchmarks.memory.true_size import adapted, converted, masked
from ila.models.loading import find_source, load_model

QUANTITIES = ("weights", "adapters", "optimizer", "gradients", "kept", "peak")


def contestants() -> dict[str, Callable[[nn.Module, bool], nn.Module]]:
    """Row -> what is done to a base, which is empty (meta) or not."""
    return {
        "PEFT": lambda base, empty: adapted(base, empty=empty),
        "ours, all open": lambda base, empty: converted(adapted(base, empty=empty)),
        "ours, 30 % at the top": lambda base, empty: masked(
            converted(adapted(base, empty=empty)), float
        ),
    }


def compare(folder: str, tokens: int) -> dict[str, Any]:
    """Count and measure each contestant, without and with checkpoints; rows for the JSON."""
    source = find_source(folder)
    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    rows = []
    for name, checkpointing, change in _cases():
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        real = load_model(source, "bfloat16", device="cpu")
        real.config.use_cache = False
        models = [
            change(without_mask(base.requires_grad_(False).train()), is_empty)
            for base, is_empty in ((empty, True), (real, False))
        ]
        row = {"contestant": name, "checkpointing": checkpointing}
        # At this very length: one chunk of a lean head holds all of its tokens.
        row["counted"] = at(count(models[0], checkpointing, tokens, by_token=False), tokens)
        row["measured"] = measure(models[1], checkpointing, tokens)
        rows.append(row)
    options = {"model": Path(folder).name, "tokens": tokens, "dtype": "bfloat16", "device": "cpu"}
    return {"options": options, "rows": rows}


def _cases() -> Iterator[tuple[str, bool, Callable[[nn.Module, bool], nn.Module]]]:
    for name, change in contestants().items():
        yield name, False, change
        yield name, True, change


def at(counted: dict[str, Any], tokens: int) -> dict[str, int]:
    """A count at one length; "peak" is beyond what stands all the time, as "kept" is."""
    kept = Bytes(*counted["kept"]).at(tokens)
    peak = max(Bytes(*line).at(tokens) for line in counted["peaks"])
    return {key: counted[key] for key in QUANTITIES[:4]} | {"kept": kept, "peak": peak}


def measure(model: nn.Module, checkpointing: bool, tokens: int) -> dict[str, int]:
    """The quantities of ``at``, and what autograd's own hooks say is kept, of a real model."""
    if checkpointing:
        checkpoint_blocks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    states = first_step(trained)
    ids = torch.arange(tokens).remainder(model.config.vocab_size)[None]

    def forward() -> Tensor:
        loss = model(**batch_of(model, ids)).loss
        gc.collect()
        return loss

    forward()  # what is made once and stays, such as a kernel's packed weights
    hooked = sum(saved_bytes(model, forward).values())
    loss, kept, _ = allocated(forward)
    del loss
    _, _, peak = allocated(lambda: forward().backward())
    own = {t.untyped_storage()._cdata for t in trained}
    stored = [*model.parameters(), *model.buffers()]
    return {
        "weights": bytes_of(t for t in stored if t.untyped_storage()._cdata not in own),
        "adapters": bytes_of(trained),
        "optimizer": bytes_of(states),
        "gradients": bytes_of(p.grad for p in trained if p.grad is not None),
        "kept": kept,
        "peak": peak,
        "kept_by_hooks": hooked,
    }

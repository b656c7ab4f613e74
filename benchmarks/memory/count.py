"""Memory of a training step at true size, counted without the hardware, for every length.

    python -m benchmarks.memory --json benchmarks/results/memory.json
    python -m benchmarks.memory --check FOLDER --json benchmarks/results/memory-check.json

Weights, AdamW's states, gradients, what the step keeps for backward and the most that is alive at
any moment of forward and backward, for one row of tokens: fake tensors run the whole step, autograd
and checkpoints included, and ``live_bytes`` counts. Logits and loss are in it (in fp32, as
transformers computes them), states are in the dtypes that ``torch.optim.AdamW`` gives them.

Not in it: what one operator needs inside of itself, the allocator's rounding and fragmentation, the
CUDA context, other programs. ``--check`` counts the same for a model that fits here and sets beside
it what PyTorch's CPU allocator handed out when that model took a real step.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benchmarks import memory_rows
from benchmarks.live_bytes import TOKENS, Bytes, LiveBytes, bytes_of
from benchmarks.memory_rows import BASES, Row, build
from benchmarks.saved_bytes import RANK, SHAPES
from ila.files import write_json_atomic
from ila.pipeline import versions


def count(model: nn.Module, checkpointing: bool = False, tokens: int = TOKENS) -> dict[str, Any]:
    """Count a step of a model on the meta device; see ``count_step``."""
    if checkpointing:
        checkpoint_blocks(model)
    with FakeTensorMode():
        stored = memory_rows.fake(model)
        return count_step(model, stored, torch.zeros(1, tokens, dtype=torch.long))


def count_step(
    model: nn.Module, stored: list[Tensor], ids: Tensor, by_token: bool = True
) -> dict[str, Any]:
    """Count the second step of training on one batch: the optimiser has its states by then.

    Args:
        model: In training mode; fake or real.
        stored: All tensors that the model consists of.
        ids: (rows, tokens).
        by_token: Whether counts are functions of the number of tokens, see ``live_bytes``.

    Returns:
        Bytes of "weights" (all that is frozen, buffers included), "adapters", "optimizer" and
        "gradients"; ``[constant, per_token]`` of "kept", which is what is there after forward
        beyond those and the batch; and "peaks", the largest of that in forward and backward.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    states = first_step(trained)
    live = LiveBytes(ids.shape[1] if by_token else None)
    live.add([*stored, *states, ids])
    start = live.now
    live.begin_anew()
    with live:
        loss = model(input_ids=ids, labels=ids).loss
        gc.collect()  # outputs that refer to each other would count as kept
        kept = live.now.minus(start)
        loss.backward()
    own = {t.untyped_storage()._cdata for t in trained}
    frozen = [t for t in stored if t.untyped_storage()._cdata not in own]
    return {
        "weights": bytes_of(frozen),
        "adapters": bytes_of(trained),
        "optimizer": bytes_of(states),
        "gradients": bytes_of(p.grad for p in trained if p.grad is not None),
        "kept": kept,
        "peaks": envelope([peak.minus(start) for peak in live.peaks]),
    }


def envelope(lines: list[Bytes]) -> list[Bytes]:
    """Those that are the largest of all at some number of tokens ≥ 1, by their slope."""
    found: list[Bytes] = []
    for line in sorted(lines, key=lambda line: (line.per_token, line.constant)):
        while found and found[-1].at(1) <= line.at(1):
            found.pop()
        # The last is above its neighbours nowhere if they cross before it crosses the one below.
        while len(found) > 1 and _crossing(found[-2], line) <= _crossing(found[-2], found[-1]):
            found.pop()
        found.append(line)
    return found


def _crossing(flat: Bytes, steep: Bytes) -> float:
    """The number of tokens from which ``steep`` is the larger."""
    return (flat.constant - steep.constant) / (steep.per_token - flat.per_token)


def first_step(trained: list[nn.Parameter]) -> list[Tensor]:
    """Let AdamW make its states; return them. The gradients are gone afterwards."""
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return [t for state in optimizer.state.values() for t in state.values()]


def checkpoint_blocks(model: nn.Module) -> None:
    """Turn gradient checkpointing on the way ``transformers.Trainer`` does."""
    model.activation_checkpointing_enable()


def count_row(make: Callable[[], nn.Module], row: Row, checkpointing: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers 5 is renaming.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        found = count(row.adapt(make()), checkpointing)
    known = {"contestant": row.contestant, "share": row.share, "position": row.position}
    return known | {"seed": row.seed, "checkpointing": checkpointing} | found


def count_all(model: str) -> list[dict[str, Any]]:
    """Every base and contestant, without and with gradient checkpointing."""
    cases = [(base, on) for base in BASES for on in (False, True)]
    jobs = [(base, on, row) for base, on in cases for row in memory_rows.rows(base, on)]
    found = []
    for base, checkpointing, row in track(jobs, f"Counting {model}"):
        counted = count_row(lambda base=base: build(model, base), row, checkpointing)
        found.append({"model": model, "base": base} | counted)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--check", metavar="FOLDER", help="count and measure this model instead")
    parser.add_argument("--tokens", type=int, default=512, help="of the step that is measured")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    document: dict[str, Any] = {"environment": {"versions": versions()}}
    if options.check:
        from benchmarks.memory_check import compare

        document |= compare(options.check, options.tokens)
    else:
        document["options"] = {"models": options.models, "rank": RANK, "rows": 1, "tokens": TOKENS}
        document["rows"] = [row for model in options.models for row in count_all(model)]
    write_json_atomic(options.json, document)


if __name__ == "__main__":
    main()

"""Bytes kept for backward by one forward pass with its loss, counted without the hardware.

    python -m benchmarks.saved_bytes [--model llama-2-7b|llama-3-8b|mistral-7b] [--json FILE]

Fake tensors have shapes, dtypes and storages but no memory. Autograd hands every tensor that a
backward function keeps to a hook; counted is each storage that is still kept when the loss is
there, once, unless it belongs to a parameter or a buffer. That is the graph's own memory: not
weights, gradients, optimiser state or what a kernel allocates for a moment.

Transformers hands a fake model an explicit causal mask, as it does a batch with padding; attention
of each block keeps one in the model's dtype. It is in every row, 2·B·T² bytes a block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from benchmarks.memory.kept import OUTSIDE, PLACES, saved_bytes
from benchmarks.memory.rows import fused
from benchmarks.memory.true_size import (
    OPEN,
    RANK,
    SHAPES,
    adapted,
    at_random,
    build,
    converted,
    fake,
    masked,
)
from ila.commands.inputs import versions
from ila.models.mlp import make_lean
from ila.runs.atomic import write_json_atomic

GIB = 2**30
DROPOUT = 0.05
SCATTERINGS = 5


def frozen(model: nn.Module) -> nn.Module:
    """No adapter, but a gradient down to the embedding: the floor if the first block is open."""
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    return model


def scattered(model: nn.Module, seed: int) -> nn.Module:
    return masked(model, at_random(seed))


def contestants() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Row -> what is done to the base model."""
    rows: dict[str, Callable[[nn.Module], nn.Module]] = {
        "PEFT": adapted,
        "PEFT, bf16 adapters": lambda base: adapted(base, bf16=True),
        "PEFT, dropout": lambda base: adapted(base, DROPOUT),
        "PEFT, fused loss": lambda base: fused(adapted(base)),
        "frozen": frozen,
        "ours, all open": lambda base: converted(adapted(base)),
        "ours, dropout": lambda base: converted(adapted(base, DROPOUT)),
    }
    for seed in range(SCATTERINGS):
        rows[f"ours, 30 % scattered ({seed})"] = lambda base, seed=seed: scattered(
            converted(adapted(base)), seed
        )
    rows["ours, 30 % at the top"] = lambda base: masked(converted(adapted(base)), float)
    rows["frozen, lean MLP"] = lambda base: (make_lean(base), frozen(base))[1]
    return rows


def count(model: nn.Module, rows: int, tokens: int) -> dict[str, int]:
    """``saved_bytes`` of a model on the meta device, for a batch of rows × tokens."""
    with FakeTensorMode():
        fake(model)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        return saved_bytes(model, lambda: model(input_ids=ids, labels=ids).loss)


def measure(name: str, rows: int, tokens: int, layers: int | None = None) -> dict[str, Any]:
    """All contestants: row -> bytes by place, and in all."""
    rows_by_name = {}
    for row, change in contestants().items():
        places = count(change(build(name, layers)), rows, tokens)
        rows_by_name[row] = {"bytes": sum(places.values()), "by_place": places}
    return rows_by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(options.model, options.rows, options.tokens)
    print(f"{options.model}, {options.rows} x {options.tokens} tokens, bf16, rank {RANK}: GiB kept")
    print(f"{'':26} {'all':>6} " + " ".join(f"{place:>24}" for place in (*PLACES, OUTSIDE)))
    for row, result in rows.items():
        places = " ".join(f"{n / GIB:24.2f}" for n in result["by_place"].values())
        print(f"{row:26} {result['bytes'] / GIB:6.2f} {places}")
    if options.json is not None:
        kept = {k: v for k, v in vars(options).items() if k != "json"}
        kept |= {"dtype": "bfloat16", "rank": RANK, "dropout": DROPOUT, "open": OPEN}
        document = {"environment": {"versions": versions()}, "options": kept, "rows": rows}
        write_json_atomic(options.json, document)


if __name__ == "__main__":
    main()

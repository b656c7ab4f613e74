"""Memory of a training step at true size, counted without the hardware, for every length.

    python -m benchmarks.memory --json benchmarks/results/memory.json
    python -m benchmarks.memory --check FOLDER --json benchmarks/results/memory-check.json

Weights, AdamW's states, gradients, what the step keeps for backward and the most that is alive at
any moment of forward and backward, for one row of tokens: fake tensors run the whole step, autograd
and checkpoints included, and ``live_bytes`` counts. Logits and loss are in it (in fp32, as
transformers computes them; a chunk at a time where the head is lean), states are in the dtypes that
``torch.optim.AdamW`` gives them.

Not in it: what one operator needs inside of itself, the allocator's rounding and fragmentation, the
CUDA context, other programs. ``--check`` counts the same for a model that fits here and sets beside
it what PyTorch's CPU allocator handed out when that model took a real step.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import nn

from benchmarks.memory.check import compare
from benchmarks.memory.count import count
from benchmarks.memory.live_bytes import TOKENS
from benchmarks.memory.rows import BASES, Row, build, rows
from benchmarks.memory.true_size import RANK, SHAPES
from ila.commands.inputs import versions
from ila.runs.atomic import write_json_atomic


def count_row(make: Callable[[], nn.Module], row: Row, checkpointing: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers 5 is renaming.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        counted = count(row.adapt(make()), checkpointing)
    known = {"contestant": row.contestant, "share": row.share, "position": row.position}
    return known | {"seed": row.seed, "checkpointing": checkpointing} | counted


def count_all(model: str) -> list[dict[str, Any]]:
    """Every base and contestant, without and with gradient checkpointing."""
    cases = [(base, on) for base in BASES for on in (False, True)]
    jobs = [(base, on, row) for base, on in cases for row in rows(base, on)]
    counts = []
    for base, checkpointing, row in track(jobs, f"Counting {model}"):
        counted = count_row(lambda base=base: build(model, base), row, checkpointing)
        counts.append({"model": model, "base": base} | counted)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--check", metavar="FOLDER", help="count and measure this model instead")
    parser.add_argument("--tokens", type=int, default=512, help="of the step that is measured")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    document: dict[str, Any] = {"environment": {"versions": versions()}}
    if options.check:
        document |= compare(options.check, options.tokens)
    else:
        document["options"] = {"models": options.models, "rank": RANK, "rows": 1, "tokens": TOKENS}
        document["rows"] = [row for model in options.models for row in count_all(model)]
    write_json_atomic(options.json, document)


if __name__ == "__main__":
    main()

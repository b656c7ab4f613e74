"""Time, tokens/s and peak memory of a training step of a real model on real rows.

    pytest benchmarks/test_model.py [--full] [--batch 4x256] [--model FOLDER] [--data FILE]

The same open layers, batches and steps: ours beside PEFT restricted to them and PEFT on all layers,
in one interleaved run. Losses and gradients are compared with fp64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness.session import Options
from benchmarks.model.cell import ModelCell
from benchmarks.model.contestants import FUSED_LOSS, KERNELS, Spec

RESULT = "model"
SHARES = (0.75, 0.3, 0.1)


def opened(options: Options) -> list[tuple[float, str]]:
    """Shares and positions beside all layers."""
    if options.size == "full":
        pairs = [(s, where) for s in SHARES for where in ("top", "scattered", "bottom")]
    else:
        pairs = [(0.75, "scattered"), (0.3, "top"), (0.3, "scattered"), (0.3, "bottom")]
        pairs = options.pick(smoke=[(0.3, "top")], quick=[*pairs, (0.1, "top")], full=None)
    if options.mask is not None:
        pairs += [(s, "learned") for s in (SHARES if options.size == "full" else (0.3,))]
    return pairs


def specs(options: Options) -> Iterator[Spec]:
    """Every contestant."""
    yield from (Spec("PEFT"), Spec("PEFT, base dtype"), Spec("PEFT, dropout"), Spec("addmm"))
    yield Spec(FUSED_LOSS)
    kinds = tuple(KERNELS) if options.device.type == "cuda" else ("ours",)
    if options.size == "full":
        yield Spec("PEFT, compiled")
    yield from (Spec(kind) for kind in (*kinds, "frozen"))
    for share, position in opened(options):
        yield from (Spec("PEFT", share, position), Spec(FUSED_LOSS, share, position))
        yield from (Spec(kind, share, position) for kind in kinds)
        if position == "top":  # scattered and bottom leave no frozen prefix to cache
            yield Spec("ours", share, position, cache=True)
    usual = [(0.3, "top"), *([(0.3, "learned")] if options.mask is not None else [])]
    under = opened(options) if options.size == "full" else usual
    yield from (Spec(kind, checkpoints=True) for kind in ("PEFT", "ours"))
    for share, position in under:
        yield from (Spec(kind, share, position, checkpoints=True) for kind in ("PEFT", "ours"))
        if position == "top" and options.size == "full":
            yield Spec("ours", share, position, checkpoints=True, cache=True)


def cells(options: Options) -> Iterator[ModelCell]:
    batch, width, rounds = options.pick(smoke=(2, 256, 2), quick=(2, 128, 7), full=(4, 256, 15))
    batch, width = options.batch or (batch, width)
    rounds = options.rounds or rounds
    yield ModelCell(options, "training step", list(specs(options)), batch, width, rounds)


@pytest.mark.gate
def test_gate(cell, session):
    session.gate(cell)


def test_model(cell, contestant, show):
    show(RESULT, cell, contestant)

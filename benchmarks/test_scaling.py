"""How the cost of a step grows with tokens, rank, depth and open layers: slopes with their spread.

    pytest benchmarks/test_scaling.py [--full] [--model FOLDER]

The first blocks of the model stand for the whole, so that a sweep is affordable. Slopes are fitted
to every round; their p10 and p90 over the rounds are the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from benchmarks.harness.session import Options
from benchmarks.model.cell import ModelCell
from benchmarks.model.contestants import Spec
from benchmarks.model.scaling import Point, ScalingCell, first_blocks

RESULT = "scaling"
ALL = (Spec("PEFT"), Spec("ours"))


def cells(options: Options) -> Iterator[ScalingCell]:
    """One cell a sweep; by rows of 128 tokens, since answers end beyond fewer."""
    blocks, width = options.pick(smoke=4, quick=8, full=16), options.pick(
        smoke=256, quick=128, full=256
    )  # fmt: skip
    rows = options.pick(smoke=(1, 2, 3), quick=(1, 2, 4, 6), full=(1, 2, 4, 8, 16))
    ranks = options.pick(smoke=(4, 8, 16), quick=(8, 64, 128, 256), full=(8, 16, 64, 128, 256))
    depths = options.pick(smoke=(2, 3, 4), quick=(2, 4, 8, 12), full=(2, 4, 8, 16, 24))
    opened = options.pick(smoke=(1, 2, 4), quick=(1, 2, 4, 8), full=(1, 2, 4, 8, 12, 16))
    rounds = options.rounds or options.pick(smoke=2, quick=7, full=15)

    def part(batch: int, count: int, rank: int = 8, specs=ALL) -> ModelCell:
        cut = partial(first_blocks, options, count)
        return ModelCell(options, "", specs, batch, width, rounds, 1, rank, cut)

    def sweep(name: str, unit: str, points: list[Point]) -> ScalingCell:
        return ScalingCell(options, name, unit, points, rounds)

    tokens = [Point(n * width, part(n, blocks), ALL) for n in rows]
    yield sweep("tokens", "tokens", tokens)
    yield sweep("rank", "ranks", [Point(r, part(1, blocks, r), ALL) for r in ranks])
    yield sweep("depth", "blocks", [Point(d, part(1, d), ALL) for d in depths])
    tops = [(7 * n, n / blocks) for n in opened]
    pairs = [
        (x, [Spec(kind, share, "top" if share < 1 else "all") for kind in ("PEFT", "ours")])
        for x, share in tops
    ]
    points = [Point(x, part(1, blocks, specs=specs), specs) for x, specs in pairs]
    yield sweep("open layers, from the top", "layers", points)


@pytest.mark.gate
def test_gate(cell, session):
    session.gate(cell)


def test_scaling(cell, contestant, show):
    show(RESULT, cell, contestant)

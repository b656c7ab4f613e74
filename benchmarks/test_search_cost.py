"""What the search costs: each stage per step, and in total against one full LoRA run.

pytest benchmarks/test_search_cost.py [--full] [--model FOLDER]
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness.session import Options
from benchmarks.model.contestants import Spec
from benchmarks.model.search import PATH, STAGE1, TRAINED, SearchCell

RESULT = "search-cost"


def cells(options: Options) -> Iterator[SearchCell]:
    specs = [Spec(kind) for kind in ("PEFT", "ours", STAGE1, PATH, TRAINED, "frozen")]
    batch, width, rounds = options.pick(smoke=(2, 256, 2), quick=(2, 128, 9), full=(4, 256, 15))
    rounds = options.rounds or rounds
    yield SearchCell(options, "steps of the search", specs, batch, width, rounds)


@pytest.mark.gate
def test_gate(cell, session):
    session.gate(cell)


def test_search_cost(cell, contestant, show):
    show(RESULT, cell, contestant)

"""The front page: a training step under a learned 30 % mask, beside PEFT on it and on all layers.

    pytest benchmarks/test_headline.py [--batch 4x256] [--mask FILE] [--model FOLDER]

The contestants of ``test_model.py`` that the README shows, alone, in one interleaved run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness.session import Options
from benchmarks.model.cell import ModelCell
from benchmarks.model.contestants import Spec

RESULT = "headline"
SHARE = 0.3


def specs(options: Options) -> Iterator[Spec]:
    """Yield PEFT and ours on all layers and on the learned ones, plain and checkpointed."""
    places = [(1.0, "all"), *([(SHARE, "learned")] if options.mask is not None else [])]
    for checkpoints in (False, True):
        for share, position in places:
            for kind in ("PEFT", "ours"):
                yield Spec(kind, share, position, checkpoints=checkpoints)


def cells(options: Options) -> Iterator[ModelCell]:
    batch, width, rounds = options.pick(smoke=(2, 64, 2), quick=(2, 128, 7), full=(4, 256, 15))
    batch, width = options.batch or (batch, width)
    yield ModelCell(
        options, "front page", list(specs(options)), batch, width, options.rounds or rounds
    )


@pytest.mark.gate
def test_gate(cell, session):
    session.gate(cell)


def test_headline(cell, contestant, show):
    show(RESULT, cell, contestant)

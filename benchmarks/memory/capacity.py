"""What a row of ``benchmarks.memory`` says at a number of tokens, and what fits on a card.

Pure arithmetic on ``[constant, per_token]``. Gradients are taken to stand during the whole step, as
they do from the second row on when they are accumulated; without that, a step takes up to their
size less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STANDING = ("weights", "adapters", "optimizer", "gradients")


def at(line: Sequence[int], tokens: int) -> int:
    """``[constant, per_token]`` at a number of tokens, in bytes."""
    return line[0] + line[1] * tokens


def total(row: Mapping[str, Any], tokens: int) -> int:
    """The most bytes that a step over one row of ``tokens`` has alive at a time."""
    return sum(row[key] for key in STANDING) + max(at(line, tokens) for line in row["peaks"])


def longest(row: Mapping[str, Any], card_bytes: float) -> int:
    """The most tokens with which ``total`` is no more than ``card_bytes``; 0: not one.

    >>> row = dict.fromkeys(STANDING, 10) | {"peaks": [[100, 1], [0, 20]]}
    >>> longest(row, 240), total(row, 10), total(row, 11), longest(row, 140)
    (10, 240, 260, 0)
    """
    room = card_bytes - sum(row[key] for key in STANDING)
    if any(constant > room for constant, per_token in row["peaks"] if not per_token):
        return 0
    counts = [(room - constant) // slope for constant, slope in row["peaks"] if slope]
    return max(0, int(min(counts)))

"""Near copies: rows that say nearly the same, so that none is held out while another trains.

Two rows are near copies if their sets of word trigrams overlap by half or more (Jaccard). Such
pairs make groups. Pairs are found by prefix filtering: with the trigrams of each row in one order,
rarest first, two sets of Jaccard ≥ t share one of the first |A| − ⌈t |A|⌉ + 1 of A (Bayardo, Ma and
Srikant, *Scaling up all pairs similarity search*, WWW 2007). No pair is missed.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ila.data.rows import split_indices
from ila.runs.progress import bar

WORDS, SAME = 3, 0.5
_WORD = re.compile(r"\w+")
Shingles = frozenset[tuple[str, ...]]


def near_copies(rows: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[int]:
    """Group rows by their texts.

    Args:
        rows: Rows of a data set, with texts at any depth.
        progress: Show a bar.

    Returns:
        For each row the number of the first row of its group, (rows,). A row without words is a
        group of its own.

    >>> near_copies([{"q": "two and two is four"}, {"q": "hello"}, {"q": "Two and two is five"}])
    [0, 1, 0]
    """
    sets = [_shingles(row) for row in rows]
    groups = _Groups(len(rows))
    for i, j in _candidates(sets, progress):
        if groups.first(i) != groups.first(j) and _overlap(sets[i], sets[j]) >= SAME:
            groups.join(i, j)
    return [groups.first(i) for i in range(len(rows))]


def split_groups(groups: Sequence[int], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide rows as ``split_indices`` does, with every group on one side.

    Rows are taken in the order of ``split_indices``, each with its whole group, as long as the
    groups fit; a group that is larger than the rest of the held-out side trains.

    Args:
        groups: Number of the group of each row.
        held_out: Rows to set aside: a count, or a fraction in (0, 1).
        seed: Same groups and seed, same division.

    Returns:
        (train, held out), neither empty; fewer are held out than asked for if no more groups fit.

    Raises:
        ValueError: As ``split_indices``, or if no group is small enough to be held out.
    """
    train, aside = split_indices(len(groups), held_out, seed)
    members = defaultdict(list)
    for row in (*aside, *train):
        members[groups[row]].append(row)
    left, chosen = len(aside), set()
    for group, found in members.items():
        if len(found) <= left:
            chosen.add(group)
            left -= len(found)
    if not chosen:
        raise ValueError(
            f"held_out must have room for a group of near copies: {len(aside)} rows are to be held "
            f"out, and the smallest of {len(members)} groups has {min(map(len, members.values()))}"
        )
    order = (*aside, *train)
    kept = [row for row in order if groups[row] in chosen]
    return [row for row in order if groups[row] not in chosen], kept


def _shingles(row: Mapping[str, Any]) -> Shingles:
    words = _WORD.findall(" ".join(_texts(row)).lower())
    if not words:
        return frozenset()
    last = max(1, len(words) - WORDS + 1)
    return frozenset(tuple(words[i : i + WORDS]) for i in range(last))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _overlap(one: Shingles, other: Shingles) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _candidates(sets: Sequence[Shingles], progress: bool) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows that share a rare trigram and are of like size."""
    counts = Counter(shingle for each in sets for shingle in each)
    seen = defaultdict(list)
    for i, each in enumerate(bar(sets, "Looking for near copies", show=progress)):
        rare = sorted(each, key=lambda shingle: (counts[shingle], shingle))
        found = set()
        for shingle in rare[: len(rare) - math.ceil(SAME * len(rare)) + 1]:
            found.update(seen[shingle])
            seen[shingle].append(i)
        for j in sorted(found):
            small, large = sorted((len(each), len(sets[j])))
            if small >= SAME * large:
                yield i, j


class _Groups:
    """Groups of rows that are joined pair by pair (union-find); the first row names a group."""

    def __init__(self, count: int):
        self.parents = list(range(count))

    def first(self, row: int) -> int:
        while self.parents[row] != row:
            self.parents[row] = self.parents[self.parents[row]]
            row = self.parents[row]
        return row

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self.parents[high] = low

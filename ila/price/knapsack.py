"""Find the most important layers that a budget pays for: an exact knapsack at each depth.

    maximise Σ score(i), i open     with     cost(open) ≤ budget

The cost of a set is not a sum over its layers. Backward goes down to the lowest open layer and
passes all layers above, open or closed; layers that read one x keep it once. A *group* is the
layers of one block that read the same x. The lowest open group decides both effects, so for each
lowest group the rest is a sum over the groups above. The best sums form a frontier: the sets that
cost less than every set of at least their importance (Nemhauser and Ullmann, 1969). All costs are
integers, so that equal sums compare equal: a network repeats few different costs, and its frontiers
stay small. A layer whose score is not positive never opens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_Choice = tuple[tuple[str, ...], float]  # layers to open, and their importance


@dataclass(frozen=True)
class Group:
    """Layers that read the same x, and their costs: integers ≥ 0.

    Attributes:
        layers: Names of the layers.
        reached: Cost if a layer of this group or below is open: a gradient reaches the output of
            the group.
        passed: Further cost if a layer below is open: the gradient passes through the group.
        shared: Cost, once, if any layer of the group is open; first the value for the lowest open
            group, then the value for any other.
        own: Cost of each open layer, in the same two cases.
    """

    layers: tuple[str, ...]
    reached: int
    passed: int
    shared: tuple[int, int]
    own: Mapping[str, tuple[int, int]]

    def opening(self, opened: Collection[str], lowest: bool) -> int:
        """Return the cost of opening layers, beside ``reached`` and ``passed``."""
        case = 0 if lowest else 1
        once = self.shared[case] if opened else 0
        return once + sum(self.own[name][case] for name in opened)


@dataclass(frozen=True)
class CostTable:
    """The cost of every set of layers: ``fixed``, and the groups from the input to the output."""

    fixed: int
    groups: tuple[Group, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Name all layers, from the input to the output."""
        return tuple(name for group in self.groups for name in group.layers)

    def cost(self, opened: Collection[str]) -> int:
        """Count the cost of a set of layers.

        Raises:
            ValueError: If a layer is not in the table.
        """
        unknown = set(opened) - set(self.layers)
        if unknown:
            raise ValueError(f"opened must be among the table's layers, got {sorted(unknown)[0]!r}")
        total, below = self.fixed, False
        for group in self.groups:
            here = [name for name in group.layers if name in opened]
            if here or below:
                total += group.reached + group.opening(here, lowest=not below)
            if below:
                total += group.passed
            below = below or bool(here)
        return total


@dataclass(frozen=True)
class Point:
    """A set of layers on a frontier: its cost, and the sum of its scores."""

    cost: int
    importance: float
    opened: tuple[str, ...]


@dataclass(frozen=True)
class _Front:
    """Sets in order of cost and importance, and the choice that made each from an earlier front."""

    costs: np.ndarray
    values: np.ndarray
    parent: np.ndarray
    choice: np.ndarray

    def __len__(self) -> int:
        return len(self.costs)


class Frontier:
    """Every set of layers that no cheaper set equals in importance.

    Args:
        table: Cost of the sets.
        scores: Layer -> importance, for the layers of the table.

    Raises:
        ValueError: If the scores are of other layers, or no score is positive.

    >>> group = Group(("a", "b"), 1, 1, (0, 0), {"a": (2, 2), "b": (3, 3)})
    >>> frontier = Frontier(CostTable(10, (group,)), {"a": 1.0, "b": 2.0})
    >>> [(p.cost, p.importance) for p in frontier]
    [(13, 1.0), (14, 2.0), (16, 3.0)]
    >>> frontier.within(15).opened
    ('b',)
    """

    def __init__(self, table: CostTable, scores: Mapping[str, float]):
        if set(scores) != set(table.layers):
            other = sorted(set(scores) ^ set(table.layers))[0]
            raise ValueError(f"scores must be of the table's layers; {other!r} is in one of them")
        if not any(score > 0 for score in scores.values()):
            raise ValueError("scores must hold a positive one; no layer lowers the loss")
        self.table = table
        self._choices = [_choices(group, scores) for group in table.groups]
        self._above: list[_Front | None] = [None] * len(table.groups)
        self._lowest: list[_Front | None] = [None] * len(table.groups)
        self._solve()

    def _solve(self) -> None:
        """Go from the output to the input: the frontier above each group, and with it as lowest."""
        nothing = np.zeros(1, dtype=np.int64)
        above = _Front(nothing, np.zeros(1), nothing, nothing)
        base = self.table.fixed
        costs, values, where, index = [], [], [], []
        for at in reversed(range(len(self.table.groups))):
            group, choices = self.table.groups[at], self._choices[at]
            self._above[at] = above
            if len(choices) > 1:
                lowest = _extended(above, group, choices[1:], lowest=True)
                self._lowest[at] = lowest
                costs.append(lowest.costs + base + group.reached)
                values.append(lowest.values)
                where.append(np.full(len(lowest), at))
                index.append(np.arange(len(lowest)))
            above = _extended(above, group, choices, lowest=False)
            base += group.reached + group.passed
        sums, gains = np.concatenate(costs), np.concatenate(values)
        kept = _undominated(sums, gains)
        self.costs, self.values = sums[kept], gains[kept]
        self._where, self._index = np.concatenate(where)[kept], np.concatenate(index)[kept]

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[Point]:
        return (self.point(at) for at in range(len(self)))

    def point(self, at: int) -> Point:
        """Return the set at a place of the frontier; place 0 holds the cheapest."""
        place = lowest = int(self._where[at])
        front, index, opened = self._lowest[lowest], int(self._index[at]), []
        while True:
            skipped = 1 if place == lowest else 0  # the lowest group has no empty choice
            opened += self._choices[place][int(front.choice[index]) + skipped][0]
            index, place = int(front.parent[index]), place + 1
            if place == len(self.table.groups):
                chosen = set(opened)
                names = tuple(name for name in self.table.layers if name in chosen)
                return Point(int(self.costs[at]), float(self.values[at]), names)
            front = self._above[place - 1]

    def within(self, budget: float) -> Point:
        """Return the most important set that costs at most ``budget``.

        Raises:
            ValueError: If every set of any importance costs more.
        """
        at = int(np.searchsorted(self.costs, budget, side="right")) - 1
        if at < 0:
            raise ValueError(f"budget must be at least {self.costs[0]}, got {budget}")
        return self.point(at)


def _choices(group: Group, scores: Mapping[str, float]) -> list[_Choice]:
    """List the sets of layers that a group may open, the empty set first, with their importance."""
    wanted = [name for name in group.layers if scores[name] > 0]
    sets = [c for size in range(len(wanted) + 1) for c in combinations(wanted, size)]
    return [(names, sum(scores[name] for name in names)) for names in sets]


def _extended(front: _Front, group: Group, choices: list[_Choice], *, lowest: bool) -> _Front:
    """Return the frontier of every set of ``front`` with every choice in ``group``."""
    adds = [group.opening(names, lowest) for names, _ in choices]
    costs = np.concatenate([front.costs + add for add in adds])
    values = np.concatenate([front.values + value for _, value in choices])
    kept = _undominated(costs, values)
    return _Front(costs[kept], values[kept], kept % len(front), kept // len(front))


def _undominated(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return, in order, the places of entries that no entry of their cost or less equals."""
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    first = np.concatenate([[True], best[1:] > best[:-1]])
    return order[first]

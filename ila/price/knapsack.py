"""The most important layers that a budget pays for: a knapsack at each depth, solved exactly.

    maximise Σ score(i), i open     with     cost(open) ≤ budget

What a set of layers costs is no sum over its layers. Backward comes down to the lowest open one and
passes everything above, open or closed; layers that read one x keep it once. Both are known once
the lowest open *step* is: layers of one block that read the same x. So for each lowest step the
rest is a sum over the steps above, and the best sums are kept as a frontier: the sets that cost
less than every set of at least their importance (Nemhauser and Ullmann, 1969). All costs are
integers, so that equal sums are found equal: a network repeats few different costs, and its
frontiers stay small. A layer whose score is not positive is never opened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Step:
    """Layers that read the same x, and what they cost. Costs are integers ≥ 0.

    Attributes:
        layers: Their names.
        reached: Paid if one of these layers, or one below, is open: a gradient comes to what these
            layers gave.
        passed: Paid besides if a layer below is open: the gradient goes on through these.
        shared: Paid once if any of these layers is open; first where this is the lowest open step,
            then where it is not.
        own: Paid for each open layer, in the same two cases.
    """

    layers: tuple[str, ...]
    reached: int
    passed: int
    shared: tuple[int, int]
    own: Mapping[str, tuple[int, int]]

    def opening(self, opened: Collection[str], lowest: bool) -> int:
        """What these open layers of the step add to its reaching and passing."""
        case = 0 if lowest else 1
        once = self.shared[case] if opened else 0
        return once + sum(self.own[name][case] for name in opened)


@dataclass(frozen=True)
class CostTable:
    """What every set of layers costs: ``fixed``, and the steps from the input to the output."""

    fixed: int
    steps: tuple[Step, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, from the input to the output."""
        return tuple(name for step in self.steps for name in step.layers)

    def cost(self, opened: Collection[str]) -> int:
        """Count the cost of a set of layers.

        Raises:
            ValueError: If a layer is not in the table.
        """
        unknown = set(opened) - set(self.layers)
        if unknown:
            raise ValueError(f"opened must be among the table's layers, got {sorted(unknown)[0]!r}")
        total, below = self.fixed, False
        for step in self.steps:
            here = [name for name in step.layers if name in opened]
            if here or below:
                total += step.reached + step.passed * below + step.opening(here, not below)
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
    """Sets in order of cost, importance growing with it; how each was made of an earlier front."""

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
        ValueError: If the scores are of other layers, or none is positive.

    >>> step = Step(("a", "b"), 1, 1, (0, 0), {"a": (2, 2), "b": (3, 3)})
    >>> frontier = Frontier(CostTable(10, (step,)), {"a": 1.0, "b": 2.0})
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
        self._choices = [_choices(step, scores) for step in table.steps]
        self._above: list[_Front | None] = [None] * len(table.steps)
        self._lowest: list[_Front | None] = [None] * len(table.steps)
        self._solve()

    def _solve(self) -> None:
        """Go from the output to the input: the frontier above each step, and with it as lowest."""
        nothing = np.zeros(1, dtype=np.int64)
        above = _Front(nothing, np.zeros(1), nothing, nothing)
        base, found = self.table.fixed, []
        for at in reversed(range(len(self.table.steps))):
            step, choices = self.table.steps[at], self._choices[at]
            self._above[at] = above
            if len(choices) > 1:
                lowest = _extended(above, step, choices[1:], lowest=True)
                self._lowest[at] = lowest
                where = np.full(len(lowest), at)
                index = np.arange(len(lowest))
                found.append((lowest.costs + base + step.reached, lowest.values, where, index))
            above = _extended(above, step, choices, lowest=False)
            base += step.reached + step.passed
        costs, values, where, index = (np.concatenate(parts) for parts in zip(*found, strict=True))
        kept = _undominated(costs, values)
        self.costs, self.values = costs[kept], values[kept]
        self._where, self._index = where[kept], index[kept]

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[Point]:
        return (self.point(at) for at in range(len(self)))

    def point(self, at: int) -> Point:
        """The set at a place of the frontier, the cheapest at 0."""
        step = lowest = int(self._where[at])
        front, index, opened = self._lowest[lowest], int(self._index[at]), []
        while True:
            skipped = 1 if step == lowest else 0  # the empty choice is none for the lowest step
            opened += self._choices[step][int(front.choice[index]) + skipped][0]
            index, step = int(front.parent[index]), step + 1
            if step == len(self.table.steps):
                chosen = set(opened)
                names = tuple(name for name in self.table.layers if name in chosen)
                return Point(int(self.costs[at]), float(self.values[at]), names)
            front = self._above[step - 1]

    def within(self, budget: float) -> Point:
        """The most important set that costs at most ``budget``.

        Raises:
            ValueError: If no set with any importance is that cheap.
        """
        at = int(np.searchsorted(self.costs, budget, side="right")) - 1
        if at < 0:
            raise ValueError(f"budget must be at least {self.costs[0]}, got {budget}")
        return self.point(at)


def _choices(step: Step, scores: Mapping[str, float]) -> list[tuple[tuple[str, ...], float]]:
    """Each set of layers of a step that may be opened, the empty one first, and its importance."""
    wanted = [name for name in step.layers if scores[name] > 0]
    sets = [c for size in range(len(wanted) + 1) for c in combinations(wanted, size)]
    return [(names, sum(scores[name] for name in names)) for names in sets]


def _extended(front: _Front, step: Step, choices: list, *, lowest: bool) -> _Front:
    """The frontier of every set of ``front`` with every choice in ``step``."""
    adds = [step.opening(names, lowest) for names, _ in choices]
    costs = np.concatenate([front.costs + add for add in adds])
    values = np.concatenate([front.values + value for _, value in choices])
    kept = _undominated(costs, values)
    return _Front(costs[kept], values[kept], kept % len(front), kept // len(front))


def _undominated(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Places of the entries that no other reaches in importance at their cost or less, in order."""
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    first = np.concatenate([[True], best[1:] > best[:-1]])
    return order[first]

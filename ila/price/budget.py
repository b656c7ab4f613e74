"""Read a budget, and find the layers of a mask that it pays for, beside the plain top-k.

    time=0.6         at most 0.6 of the time of a step with all layers open
    memory=12GiB     at most that much held when backward begins (``ila.price.costs.memory_table``)
    parameters=1M    at most that many trainable parameters

The importance of a set is the sum of its scores. The scores of method ``path`` add up to the loss
that the whole adapter removes, so that a sum is a share of it; other scores only rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

from ila.masks.mask import LayerMask
from ila.price.costs import memory_table, parameter_table
from ila.price.knapsack import CostTable, Frontier, Point
from ila.price.shapes import Shape
from ila.price.speed import Speed, step_table

TIME, MEMORY, PARAMETERS = "time", "memory", "parameters"
ADDITIVE = ("path",)  # methods whose scores add up to the loss that the adapter removes
_UNITS = {
    TIME: {"": 1.0},
    MEMORY: {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    PARAMETERS: {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
}
_EXAMPLES = {TIME: "time=0.6", MEMORY: "memory=12GiB", PARAMETERS: "parameters=1M"}


@dataclass(frozen=True)
class Budget:
    """A limit of time, memory or parameters: shares of a step, bytes, or a number."""

    resource: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"time=0.6"``, ``"memory=12GiB"`` or ``"parameters=1M"``.

        Raises:
            ValueError: If the text is not a budget; the message names the missing part.

        >>> Budget.parse("memory=1.5GiB").amount
        1610612736.0
        """
        resource, _, rest = (part.strip() for part in text.partition("="))
        if resource not in _UNITS:
            raise ValueError(f"budget must be like {', '.join(_EXAMPLES.values())}, got {text!r}")
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)", rest)
        if match is None or match[2] not in _UNITS[resource]:
            units = [unit for unit in _UNITS[resource] if unit]
            form = f"a number in {', '.join(units)}" if units else "a share such as 0.6"
            example = _EXAMPLES[resource]
            raise ValueError(f"budget {resource} must be {form} ({example}), got {rest!r}")
        amount = float(match[1]) * _UNITS[resource][match[2]]
        if not 0 < amount < math.inf or (resource == TIME and amount > 1):
            share = "in (0, 1], a share of the step with all layers open"
            limits = share if resource == TIME else "> 0"
            raise ValueError(f"budget {resource} must be {limits}, got {rest!r}")
        return cls(resource, amount)

    def text(self, amount: float) -> str:
        """Write an amount of this resource for people."""
        if self.resource == TIME:
            return f"{amount:.3f} of the step with all layers open"
        if self.resource == MEMORY:
            return f"{amount / 2**30:.3f} GiB"
        return f"{amount / 1e6:.3f} M parameters"


@dataclass(frozen=True)
class Spending:
    """Costs of the layers of a mask in the unit of a budget, and the best sets for it.

    Args:
        mask: Scores; the gates are not read.
        budget: Limit; its resource decides the unit.
        shape: Sizes of model and step; ``rank`` must be the rank of the training.
        speed: Fitted rates or the name of a GPU, for a budget of time.
    """

    mask: LayerMask
    budget: Budget
    shape: Shape
    speed: Speed | str | None = None

    @cached_property
    def table(self) -> CostTable:
        """Return the integer costs of every set of layers."""
        if self.budget.resource == MEMORY:
            return memory_table(self.shape, self.mask.scores)
        if self.budget.resource == PARAMETERS:
            return parameter_table(self.shape, self.mask.scores)
        if self.speed is None:
            raise ValueError(
                "a budget of time needs speed: rates of `ila measure`, or a GPU's name"
            )
        return step_table(self.shape, list(self.mask.scores), self.speed)

    @cached_property
    def unit(self) -> int:
        """Return the cost of an amount of 1: the step with all layers open, a byte, a parameter."""
        return self.table.cost(self.mask.scores) if self.budget.resource == TIME else 1

    @cached_property
    def frontier(self) -> Frontier:
        """Return the sets that no cheaper set equals."""
        return Frontier(self.table, self.mask.scores)

    @cached_property
    def plain(self) -> list[Point]:
        """Return the best k layers by score, for every k."""
        ranking = self.mask.ranking
        return [self.priced(ranking[:k]) for k in range(1, len(ranking) + 1)]

    def priced(self, opened: tuple[str, ...]) -> Point:
        """Return cost and importance of a set; the sum does not depend on its order."""
        importance = math.fsum(self.mask.scores[name] for name in opened)
        return Point(self.table.cost(set(opened)), importance, opened)

    def chosen(self) -> Point:
        """Return the most important set that the budget pays for.

        Raises:
            ValueError: If every set costs more; the message names the cheapest.
        """
        limit = self.budget.amount * self.unit
        cheapest = self.frontier.point(0)
        if limit < cheapest.cost:
            raise ValueError(
                f"budget {self.budget.resource} of {self.budget.text(self.budget.amount)} is below "
                f"the cheapest possible, {self.budget.text(cheapest.cost / self.unit)}: "
                f"{', '.join(cheapest.opened)} alone"
            )
        return self.priced(self.frontier.within(limit).opened)

    def plain_within(self) -> Point | None:
        """Return the longest top-k that the budget pays for; None if it pays for no layer."""
        limit = self.budget.amount * self.unit
        affordable = [point for point in self.plain if point.cost <= limit]
        return affordable[-1] if affordable else None

    def curves(self, most: int = 200) -> dict[str, list[list[float]]]:
        """Return [cost as in budgets, share of the importance]: a thinned frontier, every top-k."""
        last = len(self.frontier) - 1
        places = sorted(
            {round(at * last / max(1, most - 1)) for at in range(most)} & {*range(last + 1)}
        )
        whole = float(self.frontier.values[-1])
        return {
            "frontier": [
                [int(self.frontier.costs[at]) / self.unit, float(self.frontier.values[at]) / whole]
                for at in places
            ],
            "plain": [[p.cost / self.unit, p.importance / whole] for p in self.plain],
        }

    def described(self, point: Point) -> dict[str, float]:
        """Describe a set for provenance and reports; the share is of all positive scores."""
        whole = float(self.frontier.values[-1])
        return {
            "layers": len(point.opened),
            self.budget.resource: point.cost / self.unit,
            "importance": point.importance,
            "importance_share": point.importance / whole,
        }

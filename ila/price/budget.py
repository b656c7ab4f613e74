"""A budget in words, and the layers of a mask that it pays for, beside the plain top-k.

    time=0.6         at most 0.6 of the time of a step with all layers open
    memory=12GiB     at most that held when backward begins (``ila.price.costs.memory_table``)
    parameters=1M    at most that many trainable parameters

Importance of a set is the sum of its scores. That is a share of the loss for the scores of method
``path``, which add up to the loss that the whole adapter removes; other scores rank at best.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ila.masks.mask import LayerMask
from ila.price.costs import memory_table, parameter_table
from ila.price.knapsack import CostTable, Frontier, Point
from ila.price.shapes import Shape
from ila.price.speed import Speed, step_table

TIME, MEMORY, PARAMETERS = "time", "memory", "parameters"
ADDITIVE = ("path",)  # methods whose scores add up to what the adapter removes of the loss
_UNITS = {
    TIME: {"": 1.0},
    MEMORY: {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    PARAMETERS: {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
}
_EXAMPLES = {TIME: "time=0.6", MEMORY: "memory=12GiB", PARAMETERS: "parameters=1M"}


@dataclass(frozen=True)
class Budget:
    """What may be spent: ``kind``, and ``amount`` in shares of a step, bytes or parameters."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"time=0.6"``, ``"memory=12GiB"`` or ``"parameters=1M"``.

        Raises:
            ValueError: If it is none of these; the message says what is missing.

        >>> Budget.parse("memory=1.5GiB").amount
        1610612736.0
        """
        kind, _, rest = (part.strip() for part in text.partition("="))
        if kind not in _UNITS:
            raise ValueError(f"budget must be like {', '.join(_EXAMPLES.values())}, got {text!r}")
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)", rest)
        if match is None or match[2] not in _UNITS[kind]:
            units = [unit for unit in _UNITS[kind] if unit]
            what = f"a number in {', '.join(units)}" if units else "a share such as 0.6"
            raise ValueError(f"budget {kind} must be {what} ({_EXAMPLES[kind]}), got {rest!r}")
        amount = float(match[1]) * _UNITS[kind][match[2]]
        if not 0 < amount < math.inf or (kind == TIME and amount > 1):
            most = "in (0, 1], a share of the step with all layers open" if kind == TIME else "> 0"
            raise ValueError(f"budget {kind} must be {most}, got {rest!r}")
        return cls(kind, amount)

    def text(self, amount: float) -> str:
        """An amount of this kind for people."""
        if self.kind == TIME:
            return f"{amount:.3f} of the step with all layers open"
        if self.kind == MEMORY:
            return f"{amount / 2**30:.3f} GiB"
        return f"{amount / 1e6:.3f} M parameters"


@dataclass(frozen=True)
class Spending:
    """What layers of a mask cost in the unit of a budget, and what can be bought.

    Args:
        mask: Scores; its gates are not read.
        budget: Its kind says what is counted.
        shape: Sizes of model and step; its ``rank`` must be that of the training.
        speed: For a budget of time: fitted rates, or the name of a GPU.
    """

    mask: LayerMask
    budget: Budget
    shape: Shape
    speed: Speed | str | None = None

    @cached_property
    def table(self) -> CostTable:
        """Integer costs of every set of layers."""
        if self.budget.kind == MEMORY:
            return memory_table(self.shape, self.mask.scores)
        if self.budget.kind == PARAMETERS:
            return parameter_table(self.shape, self.mask.scores)
        if self.speed is None:
            raise ValueError(
                "a budget of time needs speed: rates of `ila measure`, or a GPU's name"
            )
        return step_table(self.shape, list(self.mask.scores), self.speed)

    @cached_property
    def unit(self) -> int:
        """Cost of what an amount of 1 means: the step with all layers open, a byte, a parameter."""
        return self.table.cost(self.mask.scores) if self.budget.kind == TIME else 1

    @cached_property
    def frontier(self) -> Frontier:
        """The sets that no cheaper one equals."""
        return Frontier(self.table, self.mask.scores)

    @cached_property
    def plain(self) -> list[Point]:
        """The best k layers by score, for every k."""
        ranking = self.mask.ranking
        return [self.priced(ranking[:k]) for k in range(1, len(ranking) + 1)]

    def priced(self, opened: tuple[str, ...]) -> Point:
        """Cost and importance of a set; the sum does not depend on its order."""
        importance = math.fsum(self.mask.scores[name] for name in opened)
        return Point(self.table.cost(set(opened)), importance, opened)

    def chosen(self) -> Point:
        """The most important set that the budget pays for.

        Raises:
            ValueError: If it pays for none; the message names the cheapest.
        """
        limit = self.budget.amount * self.unit
        cheapest = self.frontier.point(0)
        if limit < cheapest.cost:
            raise ValueError(
                f"budget {self.budget.kind} of {self.budget.text(self.budget.amount)} is below the "
                f"cheapest possible, {self.budget.text(cheapest.cost / self.unit)}: "
                f"{', '.join(cheapest.opened)} alone"
            )
        return self.priced(self.frontier.within(limit).opened)

    def plain_within(self) -> Point | None:
        """The most of the best layers by score that the budget pays for; None if not one."""
        limit = self.budget.amount * self.unit
        return max(
            (p for p in self.plain if p.cost <= limit), key=lambda p: len(p.opened), default=None
        )

    def curves(self, most: int = 200) -> dict[str, list[list[float]]]:
        """Cost (as in budgets) and share of the importance: the frontier thinned, every top-k."""
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

    def described(self, point: Point) -> dict[str, Any]:
        """A set for provenance and reports; its share is of all positive scores."""
        whole = float(self.frontier.values[-1])
        return {
            "layers": len(point.opened),
            self.budget.kind: point.cost / self.unit,
            "importance": point.importance,
            "importance_share": point.importance / whole,
        }


def method_of(mask: LayerMask) -> str | None:
    """How the scores of a mask were found, if it says so."""
    search: Any = mask.provenance.get("search")
    config = search.get("config") if isinstance(search, Mapping) else None
    return config.get("method") if isinstance(config, Mapping) else None

"""How the cost of a training step grows along one axis, all points in one interleaved run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.harness.session import Options, Row
from benchmarks.harness.slopes import fitted
from benchmarks.harness.timing import interleaved, spread
from benchmarks.model.cell import ModelCell
from benchmarks.model.contestants import Spec, share_copy
from benchmarks.model.material import base_model
from ila.models.blocks import find_blocks


@dataclass(frozen=True)
class Point:
    """One point of a sweep: its place on the axis, and who runs there."""

    x: float
    cell: ModelCell
    specs: Sequence[Spec]


@dataclass(eq=False)
class ScalingCell:
    """Points of one sweep.

    Attributes:
        name: Of the sweep.
        unit: What x counts.
        points: In rising order; at each the same kinds of contestants.
        rounds: Interleaved rounds.
    """

    options: Options
    name: str
    unit: str
    points: Sequence[Point]
    rounds: int

    @property
    def contestants(self) -> list[str]:
        return [self._title(p, spec) for p in self.points for spec in p.specs]

    def _title(self, point: Point, spec: Spec) -> str:
        return f"{spec.kind}, {point.x:g} {self.unit}"

    def conditions(self) -> dict[str, Any]:
        first = self.points[0].cell.conditions()
        return first | {"rounds": self.rounds, "points": [point.x for point in self.points]}

    def check(self) -> None:
        """Losses and gradients at the first point, as for a model."""
        self.points[0].cell.check()

    def measure(self) -> tuple[list[Row], Mapping[str, list[float]]]:
        with ExitStack() as stack:
            runs = {
                self._title(point, spec): point.cell.run_of(spec, stack)
                for point in self.points
                for spec in point.specs
            }
            times = interleaved(runs, self.rounds, self.options.watch, warm_up=2)
        total = {name: [sum(t) for t in rounds] for name, rounds in times.items()}
        rows: list[Row] = []
        for kind in dict.fromkeys(spec.kind for spec in self.points[0].specs):
            timed = [(p, s, total[self._title(p, s)]) for p in self.points for s in p.specs]
            own = [(p.x, t, self._title(p, s)) for p, s, t in timed if s.kind == kind]
            shared = {"sweep": self.name, "unit": self.unit, "kind": kind}
            rows += [
                shared | {"contestant": title, "x": x} | spread(times) for x, times, title in own
            ]
            fit = fitted([x for x, _, _ in own], [times for _, times, _ in own])
            rows.append(shared | {"fit": True} | fit)
        return rows, {name: [ms / 1e3 for ms in rounds] for name, rounds in total.items()}


def first_blocks(options: Options, count: int) -> nn.Module:
    """The model with its first blocks only, over the same tensors."""
    model = share_copy(base_model(options))
    blocks = find_blocks(model)
    layers = nn.ModuleList(list(blocks.layers)[:count])
    name = next(name for name, child in blocks.decoder.named_children() if child is blocks.layers)
    setattr(blocks.decoder, name, layers)
    model.config.num_hidden_layers = len(layers)
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        model.config.layer_types = types[: len(layers)]
    return model

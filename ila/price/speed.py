"""Turn counted work into milliseconds: by rates fitted to measured steps, or a GPU's ceilings.

    time(step) = fixed + labels · d + flops · a + bytes · b + open layers · c

``fixed`` is the part that no mask changes, without the head. d is head and loss of one token that
is a label: two steps that differ in their labels alone tell it. ``fit`` takes the steps of a few
masks, weighs each by its own time, and finds three rates ≥ 0. It also leaves each step out in turn,
fits the others and predicts it: the worst error says how far to trust the rates. A file keeps rates
and measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ila.price.costs import Work, ceiling_price, fixed_work, time_table
from ila.price.knapsack import CostTable
from ila.price.shapes import Shape
from ila.runs.atomic import write_json_atomic
from ila.runs.records import COUNT, OBJECT, RATE, SIZE, TEXT, check_record, read_record
from ila_kernels.roofline import CEILINGS

FORMAT, VERSION = "ila.speed", 1
_RATES = ("per_flop_ms", "per_byte_ms", "per_layer_ms")
_FIELDS = {
    "format": TEXT,
    "version": COUNT,
    "fixed_ms": RATE,
    **dict.fromkeys(_RATES, RATE),
    "per_label_ms": RATE,
    "worst_error": RATE,
    "measured": OBJECT,
}
_MEASURED = {"device": TEXT, "rows": SIZE, "length": SIZE, "rank": SIZE}
_PICOSECONDS = 1e9  # in a millisecond; costs are integers


@dataclass(frozen=True)
class Speed:
    """Fitted rates: milliseconds of the fixed part, per FLOP, per byte, per open layer.

    Attributes:
        per_label_ms: Milliseconds of head and loss per token that is a label; 0 where the fixed
            part has them in it.
        worst_error: Largest relative error of a step that the fit had not seen.
        measured: Device, model, rows, length, rank and times of the measurement.
    """

    fixed_ms: float
    per_flop_ms: float
    per_byte_ms: float
    per_layer_ms: float
    per_label_ms: float = 0.0
    worst_error: float = math.nan
    measured: Mapping[str, Any] = field(default_factory=dict)

    def milliseconds(self, work: Work) -> float:
        """Return the time of a step that does this work beside the fixed part."""
        flops, moved = self.per_flop_ms * work.flops, self.per_byte_ms * work.bytes
        return self.fixed_ms + (flops + moved + self.per_layer_ms * work.layers)

    def fixed_of(self, shape: Shape) -> float:
        """Return the milliseconds of a step that no mask changes, with its head and loss."""
        return self.fixed_ms + self.per_label_ms * shape.labels

    def with_head(self, saved_ms: float, labels: int, fewer: int) -> Speed:
        """Take the head out of the fixed part.

        Args:
            saved_ms: Time that fewer labels saved a step; below 0 it was noise.
            labels: How many the steps had that were fitted.
            fewer: How many the other had.

        >>> speed = Speed(10.0, 0.0, 0.0, 0.0).with_head(4.0, 100, 50)
        >>> speed.fixed_ms, speed.per_label_ms
        (2.0, 0.08)
        """
        if labels <= fewer or saved_ms <= 0:
            return self
        per_label = min(saved_ms / (labels - fewer), self.fixed_ms / labels)
        return replace(self, fixed_ms=self.fixed_ms - per_label * labels, per_label_ms=per_label)

    def price(self, work: Work) -> int:
        """Return the picoseconds of a piece of work."""
        return round((self.milliseconds(work) - self.fixed_ms) * _PICOSECONDS)

    def save(self, path: Path) -> None:
        """Write the rates and their measurements."""
        write_json_atomic(path, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Speed:
        """Read a file that ``save`` wrote.

        Raises:
            ValueError: If the file is missing, or is not a file of speeds.
        """
        hint = " of speeds; `ila measure` writes one"
        record = read_record(path, _FIELDS, hint)
        if (record.pop("format"), record.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path}: not a file of speeds: expected {FORMAT} of {VERSION}")
        unknown = sorted(set(record) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{path}: not a file of speeds: unknown {', '.join(unknown)}")
        check_record(record["measured"], _MEASURED, f"{path}, measured")
        if isinstance(record["measured"].get("model"), Mapping):
            check_record(record["measured"]["model"], {"source": TEXT}, f"{path}, model")
        if not any(record[name] for name in _RATES):
            raise ValueError(f"{path}: all rates are 0, by which every step takes as long; measure")
        return cls(**record)


def fit(works: Sequence[Work], times_ms: Sequence[float]) -> Speed:
    """Fit the rates to measured steps, and predict each from the others.

    Raises:
        ValueError: If there are fewer than five steps (one more than the fitted numbers), or not
            one time for each.

    >>> works = [Work(10, 0, 1), Work(20, 5, 2), Work(0, 40, 3), Work(7, 7, 9), Work(1, 90, 1)]
    >>> speed = fit(works, [100 + 2.0 * w.flops + 0.5 * w.bytes for w in works])
    >>> round(speed.fixed_ms), round(speed.per_flop_ms, 6), round(speed.worst_error, 6)
    (100, 2.0, 0.0)
    """
    if len(works) != len(times_ms) or len(works) < 5:
        raise ValueError(
            f"works must hold ≥ 5 steps, one a time, got {len(works)} and {len(times_ms)} times"
        )
    errors = []
    for out in range(len(works)):
        rest = [i for i in range(len(works)) if i != out]
        speed = _fit([works[i] for i in rest], [times_ms[i] for i in rest])
        errors.append(abs(speed.milliseconds(works[out]) / times_ms[out] - 1))
    best = _fit(works, times_ms)
    return replace(best, worst_error=max(errors))


def _fit(works: Sequence[Work], times_ms: Sequence[float]) -> Speed:
    """Minimise the squared relative errors over the subsets of rates, all of them ≥ 0."""
    times = np.array(times_ms)
    columns = np.column_stack([np.ones(len(works)), np.array(works, dtype=float)])
    scale = columns.max(axis=0)
    scale[scale == 0] = 1.0
    rows = columns / scale / times[:, None]
    best, least = np.zeros(4), math.inf
    for size in range(1, 5):
        for chosen in map(list, combinations(range(4), size)):
            rates, *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(times)), rcond=None)
            error = float(np.sum((rows[:, chosen] @ rates - 1) ** 2))
            if rates.min() >= 0 and error < least:
                best, least = np.zeros(4), error
                best[chosen] = rates
    fixed, per_flop, per_byte, per_layer = (best / scale).tolist()
    return Speed(fixed, per_flop, per_byte, per_layer)


def works(shape: Shape, names: Sequence[str], sets: Sequence[set[str]]) -> list[Work]:
    """Return the work of a step of each set of open layers, beside the fixed part."""
    flops = time_table(shape, names, lambda work: work.flops, 0)
    moved = time_table(shape, names, lambda work: work.bytes, 0)
    layers = time_table(shape, names, lambda work: work.layers, 0)
    return [Work(flops.cost(opened), moved.cost(opened), layers.cost(opened)) for opened in sets]


def step_table(shape: Shape, names: Sequence[str], speed: Speed | str) -> CostTable:
    """Return picoseconds of a step, by fitted rates or at the data-sheet ceilings of a GPU.

    Raises:
        ValueError: If ``speed`` names a GPU without known ceilings.
    """
    if isinstance(speed, Speed):
        return time_table(shape, names, speed.price, round(speed.fixed_of(shape) * _PICOSECONDS))
    if speed not in CEILINGS:
        raise ValueError(
            f"speed must be a file of `ila measure` or one of {list(CEILINGS)}, got {speed!r}"
        )
    price = ceiling_price(CEILINGS[speed])
    return time_table(shape, names, price, sum(price(work) for work in fixed_work(shape)))

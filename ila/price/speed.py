"""Counted work to milliseconds: rates fitted to measured steps, or the ceilings of a GPU.

    time(step) = fixed + flops · a + bytes · b + open layers · c

``fixed`` is what no mask changes. The three rates are ≥ 0 and are fitted to the steps of a few
masks, each weighed by its own time (``fit``); leaving one of them out, fitting the others and
predicting it says how far to trust that. A file keeps them with what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ila.price.costs import Price, Work, ceiling_price, fixed_work, time_table
from ila.price.knapsack import CostTable
from ila.price.shapes import Shape
from ila.runs.atomic import write_json_atomic
from ila.runs.records import COUNT, OBJECT, RATE, SIZE, TEXT, check_record, read_record
from ila_kernels.roofline import CEILINGS

FORMAT, VERSION = "ila.speed", 1
_RATES = ("per_flop_ms", "per_byte_ms", "per_layer_ms")
_FIELDS = {
    **{"format": TEXT, "version": COUNT, "fixed_ms": RATE, **dict.fromkeys(_RATES, RATE)},
    **{"worst_error": RATE, "measured": OBJECT},
}
_MEASURED = {"device": TEXT, "rows": SIZE, "length": SIZE, "rank": SIZE}
_PICOSECONDS = 1e9  # in a millisecond; costs are integers


@dataclass(frozen=True)
class Speed:
    """Fitted rates: milliseconds for everything fixed, per FLOP, per byte, per open layer.

    Attributes:
        worst_error: The largest relative error of a step that the fit had not seen.
        measured: Where and on what: device, model, rows, length, rank, times.
    """

    fixed_ms: float
    per_flop_ms: float
    per_byte_ms: float
    per_layer_ms: float
    worst_error: float = math.nan
    measured: Mapping[str, Any] = field(default_factory=dict)

    def milliseconds(self, work: Work) -> float:
        """Time of a step that does this beside what is fixed."""
        rates = (self.per_flop_ms, self.per_byte_ms, self.per_layer_ms)
        return self.fixed_ms + sum(r * amount for r, amount in zip(rates, work, strict=True))

    def price(self, work: Work) -> int:
        """Picoseconds of a piece of work."""
        return round((self.milliseconds(work) - self.fixed_ms) * _PICOSECONDS)

    def save(self, path: Path) -> None:
        """Write the rates and what they come from."""
        write_json_atomic(path, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Speed:
        """Read what ``save`` wrote.

        Raises:
            ValueError: If there is no such file, or it is none of ours.
        """
        hint = " of speeds; `ila measure` writes one"
        found = read_record(path, _FIELDS, hint)
        if (found.pop("format"), found.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path}: not a file of speeds: expected {FORMAT} of {VERSION}")
        unknown = sorted(set(found) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{path}: not a file of speeds: unknown {', '.join(unknown)}")
        check_record(found["measured"], _MEASURED, f"{path}, measured")
        if isinstance(found["measured"].get("model"), Mapping):
            check_record(found["measured"]["model"], {"source": TEXT}, f"{path}, model")
        if not any(found[name] for name in _RATES):
            raise ValueError(f"{path}: all rates are 0, by which every step takes as long; measure")
        return cls(**found)


def fit(works: Sequence[Work], times_ms: Sequence[float]) -> Speed:
    """Fit the rates to measured steps, and predict each from the others.

    Raises:
        ValueError: If fewer than five steps are given, which is one more than there are rates, or
            not as many times.

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
    return Speed(best.fixed_ms, best.per_flop_ms, best.per_byte_ms, best.per_layer_ms, max(errors))


def _fit(works: Sequence[Work], times_ms: Sequence[float]) -> Speed:
    """Least squares of relative errors with rates ≥ 0: the best subset whose rates all are."""
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
    return Speed(*(float(rate) for rate in best / scale))


def works(shape: Shape, names: Sequence[str], sets: Sequence[set[str]]) -> list[Work]:
    """What a step of each set of open layers does beside what is fixed."""
    parts: list[Price] = [lambda w: w.flops, lambda w: w.bytes, lambda w: w.layers]
    tables = [time_table(shape, names, part, 0) for part in parts]
    return [Work(*(table.cost(opened) for table in tables)) for opened in sets]


def step_table(shape: Shape, names: Sequence[str], speed: Speed | str) -> CostTable:
    """Picoseconds of a step, by fitted rates or at the data-sheet ceilings of a GPU.

    Raises:
        ValueError: If ``speed`` names no GPU whose ceilings are known.
    """
    if isinstance(speed, Speed):
        return time_table(shape, names, speed.price, round(speed.fixed_ms * _PICOSECONDS))
    if speed not in CEILINGS:
        raise ValueError(
            f"speed must be a file of `ila measure` or one of {list(CEILINGS)}, got {speed!r}"
        )
    price = ceiling_price(CEILINGS[speed])
    return time_table(shape, names, price, sum(price(work) for work in fixed_work(shape)))

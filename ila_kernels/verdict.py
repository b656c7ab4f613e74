"""Verdicts: the time of each implementation for one call on one machine, and the fastest of them.

Pure data and pure functions, without torch. ``tuning`` measures, ``store`` keeps verdicts on disk,
and ``choice`` looks them up.

The rule: candidates are compared from the simplest on, and one replaces the best so far if it is
faster by more than 3 % in at least 5 of 7 rounds. So a near-tie stays with the simpler one, and a
tie with eager stays eager.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

FORMAT, VERSION = "ila.verdict", 1
# The simplest first. "persistent" is "triton" with the persistent form of its GEMM.
CANDIDATES = ("eager", "hybrid", "triton", "persistent")
MARGIN = 0.03
LEAST_SHARE = 5 / 7
# A verdict holds for rows up to this factor from the measured rows.
REACH = 4


@dataclass(frozen=True)
class Machine:
    """The GPU and the versions that a measurement depends on; if one differs, it does not count."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    triton: str
    library: str

    def digest(self) -> str:
        """Return a short name of this machine for a folder.

        >>> len(Machine("a GPU", "12080", "12.8", "2.9", "3.5", "0.1").digest())
        16
        """
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One kind of call: M rows, K, the N of each open layer of one x, R, dtypes, dropout or not."""

    rows: int
    k: int
    ns: tuple[int, ...]
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool

    def __str__(self) -> str:
        """Write it as ``4096 → 1024 + 1024 at 2048 rows``."""
        dropout = ", dropout" if self.dropout else ""
        return f"{self.k} → {' + '.join(map(str, self.ns))} at {self.rows} rows{dropout}"

    @property
    def key(self) -> Key:
        """The properties that a call must share with the cell; its rows only need to be near."""
        return key_of(self.k, self.ns, self.r, self.dtype, self.adapter_dtype, self.dropout)


Key = tuple[int, tuple[int, ...], int, str, str, bool]


def key_of(
    k: int, ns: tuple[int, ...], r: int, dtype: str, adapter_dtype: str, dropout: bool
) -> Key:
    """Describe a call up to its rows; ranks that pad to the same block are one.

    >>> key_of(64, (32,), 8, "bfloat16", "float32", False)
    (64, (32,), 16, 'bfloat16', 'float32', False)
    """
    return k, ns, max(16, 1 << (r - 1).bit_length()), dtype, adapter_dtype, dropout


def beats(ours: Iterable[float], best: Iterable[float]) -> bool:
    """Tell whether ``ours`` is faster by more than the margin in enough of the rounds.

    >>> beats([0.9] * 5 + [1.0] * 2, [1.0] * 7), beats([0.9] * 4 + [1.0] * 3, [1.0] * 7)
    (True, False)
    """
    faster = [a < (1.0 - MARGIN) * b for a, b in zip(ours, best, strict=True)]
    return sum(faster) >= math.ceil(LEAST_SHARE * len(faster))


def decide(ms: Mapping[str, tuple[float, ...]], without: Iterable[str] = ()) -> str:
    """Pick the implementation from the milliseconds of interleaved rounds.

    >>> decide({"eager": (1.0,) * 7, "hybrid": (0.98,) * 7, "triton": (0.9,) * 7})
    'triton'
    """
    best = "eager"
    for candidate in CANDIDATES[1:]:
        if candidate in ms and candidate not in without and beats(ms[candidate], ms[best]):
            best = candidate
    return best


@dataclass(frozen=True)
class Verdict:
    """One measurement; ``left_out`` names the candidates that could not run, and why."""

    machine: Machine
    cell: Cell
    ms: Mapping[str, tuple[float, ...]]
    day: str
    left_out: Mapping[str, str] = field(default_factory=dict)

    def pick(self, gemm: str | None = None) -> str:
        """Return the implementation; ``gemm="pointer"`` rules the persistent form out."""
        return decide(self.ms, without=("persistent",) if gemm == "pointer" else ())

    def median(self, candidate: str) -> float:
        """Return the median of a candidate in milliseconds."""
        return statistics.median(self.ms[candidate])

    def why(self, impl: str) -> str:
        """Quote the measurement as the reason for ``impl``."""
        text = f"measured on {self.day}, {self.cell}"
        if impl == "eager":
            others = (f"{c} {self.median(c) / self.median('eager'):.2f}" for c in self.ms)
            rest = ", ".join(list(others)[1:]) or "no other candidate ran"
            return f"{text}: nothing beat it by 3 % ({rest} of its time)"
        share = self.median(impl) / self.median("eager")
        return f"{text}: {share:.2f} of eager's time, {self._wins(impl)}"

    def __str__(self) -> str:
        """Write the medians, the choice by them, and the implementations that could not run."""
        chosen = self.pick()
        times = ", ".join(f"{name} {self.median(name):.3g}" for name in self.ms)
        wins = "" if chosen == "eager" else f" ({self._wins(chosen)})"
        out = [f"\n  without {name}: {why}" for name, why in self.left_out.items()]
        return f"{self.cell}: {times} ms -> {chosen}{wins}{''.join(out)}"

    def _wins(self, impl: str) -> str:
        pairs = list(zip(self.ms[impl], self.ms["eager"], strict=True))
        return f"faster in {sum(a < b for a, b in pairs)} of {len(pairs)} rounds"

    def to_json(self) -> dict[str, object]:
        """Return plain data, which ``from_json`` reads."""
        # As a file gives it back: lists, no tuples.
        return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @classmethod
    def from_json(cls, data: object) -> Verdict:
        """Read ``to_json``.

        Raises:
            ValueError: If it is not that; the message names the field.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a verdict must be an object, got {type(data).__name__}")
        for name, expected in (("format", FORMAT), ("version", VERSION)):
            if data.get(name) != expected:
                raise ValueError(f"{name} must be {expected!r}, got {data.get(name)!r}")
        machine = Machine(**_fields(data, "machine", Machine))
        cell = _fields(data, "cell", Cell)
        if not isinstance(cell["ns"], (list, tuple)) or not all(
            isinstance(n, int) and n > 0 for n in (*cell["ns"], cell["rows"], cell["k"], cell["r"])
        ):
            raise ValueError(f"the sizes of the cell must be positive integers, got {cell}")
        ms, left_out, day = data.get("ms"), data.get("left_out"), data.get("day")
        if not isinstance(left_out, dict) or not isinstance(day, str):
            raise ValueError("left_out must be an object and day a string")
        return cls(machine, Cell(**cell | {"ns": tuple(cell["ns"])}), _times(ms), day, left_out)


def _fields(data: Mapping[str, object], name: str, kind: type) -> dict[str, object]:
    value, names = data.get(name), {f.name for f in fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"{name} must be an object of {sorted(names)}, got {value!r}")
    return value


def _times(ms: object) -> dict[str, tuple[float, ...]]:
    rows = ms if isinstance(ms, dict) else {}
    lengths = {len(times) if isinstance(times, (list, tuple)) else 0 for times in rows.values()}
    if "eager" not in rows or not set(rows) <= set(CANDIDATES) or lengths & {0} or len(lengths) > 1:
        raise ValueError(f"ms must hold the rounds of eager and other candidates, got {ms!r}")
    for times in rows.values():
        if not all(isinstance(t, (int, float)) and 0.0 < t < math.inf for t in times):
            raise ValueError(f"ms must hold positive finite numbers, got {times!r}")
    return {name: tuple(times) for name, times in rows.items()}


class Picked(NamedTuple):
    """A verdict's choice, made once, and the rows that it holds for.

    Each choice is (implementation, reason): with any form of the GEMM, or with pointers only.
    """

    least: float
    most: float
    any_form: tuple[str, str]
    pointer_only: tuple[str, str]


class Verdicts:
    """An immutable look-up of verdicts; of two for one cell and machine the later one counts."""

    def __init__(self, verdicts: Iterable[Verdict] = ()):
        latest = {(v.machine, v.cell): v for v in verdicts}
        self.all = tuple(latest.values())
        kinds: dict[tuple[str, Key], list[Verdict]] = {}
        for verdict in self.all:
            kinds.setdefault((verdict.machine.gpu, verdict.cell.key), []).append(verdict)
        self._table = {kind: _by_rows(found) for kind, found in kinds.items()}

    def find(self, gpu: str, key: Key, rows: int | None) -> Picked | None:
        """Return the choice at the nearest number of rows; ``None`` stands for many rows."""
        found = self._table.get((gpu, key))
        if found is None:
            return None
        if rows is None:
            return found[-1]
        for picked in found:
            if rows <= picked.most:
                return picked if rows >= picked.least else None
        return None


def _by_rows(verdicts: Iterable[Verdict]) -> tuple[Picked, ...]:
    """Sort verdicts by rows; each holds up to the geometric mean with its neighbours."""
    ordered = sorted(verdicts, key=lambda v: v.cell.rows)
    rows = [v.cell.rows for v in ordered]
    most = [min(REACH * a, math.sqrt(a * b)) for a, b in itertools.pairwise(rows)]
    picks = []
    for verdict, upper in zip(ordered, [*most, REACH * rows[-1]], strict=True):
        choices = (verdict.pick(gemm) for gemm in (None, "pointer"))
        reasons = [(impl, verdict.why(impl)) for impl in choices]
        picks.append(Picked(verdict.cell.rows / REACH, upper, *reasons))
    return tuple(picks)

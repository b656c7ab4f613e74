"""Interleaved rounds and what is said of them: medians, p10 and p90, ratios within a round.

Two runs that come one after the other are compared under two states of the machine; two runs of
the same round are not. So every contestant runs once in every round, in an order drawn anew for
each, and a ratio is the median over the rounds of time / time of the other in the same round.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# What is in a GPU's L2 cache after one contestant must not be a present to the next.
L2_FLUSH_BYTES = 256 * 2**20

Mark = Callable[[], None]
# Called with ``mark``, which ends a phase, and the number of the round.
Run = Callable[[Mark, int], None]


@dataclass(frozen=True)
class Watch:
    """Times runs on a device: with events on a GPU, else with a clock of ``CLOCKS``.

    ``"cpu"`` counts what this process computed over all its threads, for a machine that is shared;
    with OMP_WAIT_POLICY=PASSIVE, or threads that wait count too.
    """

    device: torch.device
    clock: str = "wall"

    def time(self, run: Run, turn: int, calls: int = 1) -> list[float]:
        """Milliseconds of each phase, mean over ``calls``."""
        found = [self._once(run, turn) for _ in range(calls)]
        return [sum(phase) / calls for phase in zip(*found, strict=True)]

    def _once(self, run: Run, turn: int) -> list[float]:
        if self.device.type == "cuda":
            return self._once_by_events(run, turn)
        clock = CLOCKS[self.clock]
        marks = [clock()]
        run(lambda: marks.append(clock()), turn)
        return [(b - a) * 1e3 for a, b in pairwise(marks)]

    def _once_by_events(self, run: Run, turn: int) -> list[float]:
        torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=self.device).zero_()
        events = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        mark()
        run(mark, turn)
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) for a, b in pairwise(events)]


def interleaved(
    runs: Mapping[str, Run], rounds: int, watch: Watch, *, calls: int = 1, warm_up: int = 1
) -> dict[str, list[list[float]]]:
    """Name -> milliseconds of each phase in each round."""
    for turn in range(warm_up):
        for run in runs.values():
            watch.time(run, turn)
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for turn in range(rounds):
        order = list(runs)
        random.Random(turn).shuffle(order)
        for name in order:
            times[name].append(watch.time(runs[name], turn, calls))
    return times


def calls_for(runs: Mapping[str, Run], watch: Watch, least_ms: float, most: int = 50) -> int:
    """Calls a sample needs for the fastest run to take ``least_ms``; every run is warmed up."""
    fastest = math.inf
    for run in runs.values():
        watch.time(run, 0)
        fastest = min(fastest, sum(watch.time(run, 0)))
    return max(1, min(most, math.ceil(least_ms / max(fastest, 1e-6))))


def quantile(values: Sequence[float], q: float) -> float:
    """The value at share ``q`` of the sorted values, interpolated.

    >>> quantile([3.0, 1.0, 2.0], 0.5), quantile([0.0, 10.0], 0.1)
    (2.0, 1.0)
    """
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90 by the names that a row has them under.

    >>> spread([1.0, 2.0, 3.0])["median_ms"]
    2.0
    """
    return {
        "median_ms": statistics.median(values),
        "p10_ms": quantile(values, 0.1),
        "p90_ms": quantile(values, 0.9),
    }


def ratio(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90 over rounds of time / the other's time in the same round.

    >>> ratio([1.0, 4.0, 3.0], [2.0, 4.0, 2.0])["median"]
    1.0
    """
    found = [a / b for a, b in zip(values, others, strict=True)]
    return {
        "median": statistics.median(found),
        "p10": quantile(found, 0.1),
        "p90": quantile(found, 0.9),
    }

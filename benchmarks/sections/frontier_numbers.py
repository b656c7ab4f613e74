"""The trainings and step times of ``benchmarks.frontier``, as points: time and gain lost."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.frontier.methods import PARTS, RATES
from benchmarks.frontier.times import CACHED, FILL, PEFT, SCAN, SCORE, set_of
from benchmarks.frontier.ways import ALL, FULL, Way
from benchmarks.sections.study_numbers import Estimate

PATH_BATCHES = 12
PRICED = (None, "path", "kappa", "snr")  # how layers are scored, where that is timed
Cell = tuple[str, int]


@dataclass(frozen=True)
class Point:
    """One way to train, over all pairs of data set and seed.

    Attributes:
        way: Way to train.
        lost: Data set and seed -> share of the gain of all layers that it loses.
        rates: Data set -> its best learning rate.
        at_edge: Data sets whose best rate is the lowest or the highest that was tried.
        by_pairs: Whether pairs of data set and seed count as replicates, and not data sets.
        times: Data set -> total time, search included, over PEFT's on all layers.
    """

    way: Way
    lost: Mapping[Cell, float]
    rates: Mapping[str, float]
    times: Mapping[str, float]
    at_edge: frozenset[str] = frozenset()
    by_pairs: bool = False

    @property
    def time(self) -> float | None:
        """Mean over the data sets; None where no time was measured."""
        return fmean(self.times.values()) if self.times else None

    def by_data(self) -> dict[str, float]:
        """Return data set -> share lost, mean over the seeds."""
        return _by_data(self.lost)

    def estimate(self) -> Estimate:
        """Return the share lost with its interval over the replicates."""
        return self.over(self.lost)

    def over(self, values: Mapping[Cell, float]) -> Estimate:
        """Return the mean of values of this way's cells, over the replicates."""
        replicates = values if self.by_pairs else _by_data(values)
        return Estimate.of(replicates.values())


def _by_data(values: Mapping[Cell, float]) -> dict[str, float]:
    sums = defaultdict(list)
    for (data, _), value in values.items():
        sums[data].append(value)
    return {data: fmean(each) for data, each in sums.items()}


class Frontier:
    """The lines of one file.

    Attributes:
        lines: Kind -> (key, result).
        parts: Names of the parts that trained all layers.
        by_pairs: What counts as a replicate, see ``Point``.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]], by_pairs: bool = False):
        self.by_pairs = by_pairs
        self.lines = defaultdict(list)
        for line in lines:
            self.lines[line["kind"]].append((line["key"], line["result"]))
        found = {key["part"] for key, _ in self.lines["frontier"]}
        self.parts = [part for part in PARTS if part in found]

    def setting(self, part: str) -> Mapping[str, Any]:
        """Return the key of the first training of a part."""
        return next(key for key, _ in self.lines["frontier"] if key["part"] == part)

    def scores(self, method: str) -> dict[Cell, list[float]]:
        """Return (data, seed) -> scores of a method, in the order of the layers."""
        return {
            (key["data"], key["seed"]): result["scores"]
            for key, result in self.lines["mask"]
            if key["method"] == method
        }

    def points(self, part: str) -> list[Point]:
        """Return a point for every way that was trained, in order."""
        whole = self._losses(part, FULL)
        points = []
        for way in PARTS[part]:
            found = self._losses(part, way)
            lost = {
                cell: (loss - whole[cell][0]) / (before - whole[cell][0])
                for cell, (loss, before, _) in found.items()
                if cell in whole
            }
            if lost:
                rates = {data: rate for (data, _), (_, _, rate) in found.items()}
                edges = frozenset(d for d in rates if self._is_at_edge(part, way, d, rates[d]))
                times = self.times(part, way)
                points.append(Point(way, lost, rates, times, edges, self.by_pairs))
        return points

    def _losses(self, part: str, way: Way) -> dict[Cell, tuple[float, float, float]]:
        """Return (data, seed) -> loss, loss before, rate: the rate that was best on one seed."""
        by_rate = defaultdict(dict)
        for key, result in self._of(part, way):
            losses = result["held_out_loss"], result["before"]
            by_rate[key["data"]].setdefault(key["seed"], {})[key["learning_rate"]] = losses
        found = {}
        for data, seeds in by_rate.items():
            searched = next(iter(seeds.values()))
            if len(searched) < len(RATES[part]):
                continue  # its best rate is not known yet
            best = min(searched, key=lambda rate: searched[rate][0])
            for seed, rates in seeds.items():
                if best in rates:
                    found[data, seed] = (*rates[best], best)
        return found

    def _of(self, part: str, way: Way) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Return the trainings of a way."""
        wanted = {"part": part, **way.key()}
        return [
            (key, result)
            for key, result in self.lines["frontier"]
            if all(key[name] == value for name, value in wanted.items())
        ]

    def _is_at_edge(self, part: str, way: Way, data: str, rate: float) -> bool:
        keys = [key for key, _ in self._of(part, way) if key["data"] == data]
        tried = [key["learning_rate"] for key in keys if key["seed"] == keys[0]["seed"]]
        return rate in (min(tried), max(tried))

    def times(self, part: str, way: Way) -> dict[str, float]:
        """Return data set -> total time of a way over PEFT's on all layers, where measured."""
        return {data: sum(both) for data, both in self.costs(part, way).items()}

    def costs(self, part: str, way: Way) -> dict[str, tuple[float, float]]:
        """Return data set -> time before the training, for scores, and time of the training."""
        costs = {}
        for key, result in self.lines["frontier times"]:
            if key["part"] == part:
                found = _costs(way, self.setting(part), part, result)
                if found is not None:
                    costs[key["data"]] = found
        return costs

    def repeats(self) -> list[float]:
        """Return the changes of trainings that ran again elsewhere, as shares of their gains."""
        first = {json.dumps(key, sort_keys=True): found for key, found in self.lines["frontier"]}
        changes = []
        for key, again in self.lines["frontier again"]:
            known = first[json.dumps(key, sort_keys=True)]
            gain = known["before"] - known["held_out_loss"]
            changes.append((again["held_out_loss"] - known["held_out_loss"]) / gain)
        return changes

    def rows(self, part: str) -> int:
        """Return the number of rows that are trained on."""
        sizes = [
            result["rows"]
            for key, result in self.lines["base"]
            if key["limit"] == self.setting(part)["limit"]
        ]
        return max(sizes)


def _costs(
    way: Way, key: Mapping[str, Any], part: str, measured: Mapping[str, Sequence[float]]
) -> tuple[float, float] | None:
    """Return times for scores and for training over PEFT's on all layers; None if not measured."""
    ms = {name: median(values) for name, values in measured.items()}
    opened, full = set_of(way), key["full"]
    if opened not in ms or way.scored_by not in PRICED:
        return None
    steps, before = way.steps(full), 0
    caching = part == "epochs" and opened + CACHED in ms
    step = ms[opened + CACHED] if caching else ms[opened]
    first = total = 0.0
    if way.search:
        first = full * ms[ALL] + PATH_BATCHES * ms[SCORE]
    if way.by_weights is not None:
        first = ms[f"{SCAN}, {way.by_weights}"]
    if way.at is not None:
        before = round(way.at * steps)
        scoring = PATH_BATCHES * ms[SCORE] if way.opened.startswith("top") else 0.0
        total = before * ms[ALL] + scoring
    if caching:
        rows = round((1 - key["held_out"]) * key["limit"])
        total += rows * ms[f"{FILL}, {opened}"]
    unit = full * ms[PEFT]
    return first / unit, (total + (steps - before) * step) / unit


def gap(one: Point, other: Point) -> Estimate:
    """Return how much more of the gain one loses than another, paired by data set and seed."""
    return one.over(_behind(one, other))


def _behind(one: Point, other: Point) -> dict[Cell, float]:
    return {cell: lost - other.lost[cell] for cell, lost in one.lost.items() if cell in other.lost}


def less_on(one: Point, other: Point) -> str:
    """Say on how many data sets one loses less than another: ``"1 of 3 data sets"``."""
    behind = _by_data(_behind(one, other)).values()
    return f"{sum(value < 0 for value in behind)} of {len(behind)} data sets"


def rival(points: Sequence[Point], one: Point) -> Point | None:
    """Return all layers, trained for the least measured time that is at least another's.

    It was trained wherever the other was; times that print alike count as alike.
    """
    longer = [
        point
        for point in points
        if point.way.opened == "all"
        and point.lost.keys() >= one.lost.keys()
        and point.time
        and one.time
        and point.time >= one.time - 0.005
    ]
    return min(longer, key=lambda point: point.time or 0.0, default=None)

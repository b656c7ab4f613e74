"""A study's lines, sorted by what they are of; means and their errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.sections.student import p_of

ALL = "all layers"
OPTIONS = ("milestone", "stage2_steps", "score_init", "score_lr")
# The 97.5 % point of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
_T += (2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval by Student's t; the interval is infinite for one value."""

    mean: float
    low: float
    high: float
    count: int
    error: float = math.inf  # standard error of the mean

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        values = list(values)
        count, mean = len(values), sum(values) / len(values)
        if count == 1:
            return cls(mean, -math.inf, math.inf, 1)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
        error = deviation / math.sqrt(count)
        half = (_T[count - 2] if count - 2 < len(_T) else _T[-1]) * error
        return cls(mean, mean - half, mean + half, count, error)

    def p(self) -> float:
        """Return the two-sided p-value of the mean against 0; 1 for one value."""
        return p_of(self.mean, self.error, self.count)

    def text(self, digits: int = 3, unit: str = "") -> str:
        """Mean and interval in words."""
        known = f"95 % interval {self.low:.{digits}f} … {self.high:.{digits}f}, n = {self.count}"
        if self.count == 1:
            known = "one value, no error known"
        return f"{self.mean:.{digits}f}{unit} ({known})"


class Study:
    """The lines of one file.

    Attributes:
        name: Name of the model.
        layers: Module names in the model's order.
        sizes: Adapter parameters of each layer.
        masks: (data, seed, method) -> scores and folds, at the options that came first.
        losses: (data, seed) -> held-out loss before any training.
        trained: (data, seed, method, cut, share) -> result; ``ALL`` has cut "" and share 1.
        agreements: Lines of kind agreement.
        key: Key of the first mask, for the options that all share.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        by = defaultdict(list)
        for line in lines:
            by[line["kind"]].append((line["key"], line["result"]))
        self.key = by["mask"][0][0]
        self.name = self.key["model"]
        self.layers = by["layers"][0][1]["names"]
        self.sizes = by["layers"][0][1]["parameters"]
        self.agreements = by["agreement"]
        self.losses = {_place(key): result["held_out_loss"] for key, result in by["base"]}
        self.stage1 = {_place(key): result for key, result in by["stage1"]}
        self.usual: dict[str, Any] = {}
        for key, _ in by["mask"]:
            for name in OPTIONS:
                if name in key:
                    self.usual.setdefault(name, key[name])
        self.masks = {
            (*_place(key), key["method"]): result
            for key, result in by["mask"]
            if self.is_usual(key)
        }
        self.trained = {
            (*_place(key), key["method"], key.get("cut", ""), key.get("share", 1.0)): result
            for key, result in by["train"]
            if self.is_usual(key)
        }
        self.steps = by["train"][0][0]["steps"] if by["train"] else None
        self.data = list(dict.fromkeys(data for data, _, _ in self.masks))
        self.seeds = list(dict.fromkeys(seed for _, seed, _ in self.masks))
        self.methods = list(dict.fromkeys(method for _, _, method in self.masks))

    def is_usual(self, key: Mapping[str, Any]) -> bool:
        """Whether a cell has the options that came first."""
        return all(key.get(name, value) == value for name, value in self.usual.items())

    def cuts(self) -> list[tuple[str, float]]:
        """(cut, share) of the trainings, in order."""
        pairs = {(cut, share) for _, _, _, cut, share in self.trained if cut}
        return sorted(pairs)

    def losing(
        self, method: str, cut: str, share: float, against: str = ALL
    ) -> dict[tuple[str, int], float]:
        """Return (data, seed) -> held-out loss minus that of another, where both were trained."""
        other = ("", 1.0) if against == ALL else (cut, share)
        found = {}
        for (data, seed, m, c, s), result in self.trained.items():
            rival = self.trained.get((data, seed, against, *other))
            if (m, c, s) == (method, cut, share) and rival:
                found[data, seed] = result["held_out_loss"] - rival["held_out_loss"]
        return found

    def lost(
        self, method: str, cut: str, share: float, against: str = ALL
    ) -> dict[tuple[str, int], float]:
        """Return (data, seed) -> loss behind another's, as a share of the gain of all layers."""
        other = ("", 1.0) if against == ALL else (cut, share)
        found = {}
        for (data, seed, m, c, s), result in self.trained.items():
            whole = self.trained.get((data, seed, ALL, "", 1.0))
            rival = self.trained.get((data, seed, against, *other))
            if (m, c, s) == (method, cut, share) and whole and rival:
                gain = self.losses[data, seed] - whole["held_out_loss"]
                behind = result["held_out_loss"] - rival["held_out_loss"]
                found[data, seed] = behind / gain
        return found

    def by_data(self, values: Mapping[tuple[str, int], float]) -> list[float]:
        """Return one value for each data set, the mean over its seeds."""
        found = defaultdict(list)
        for (data, _), value in values.items():
            found[data].append(value)
        return [sum(some) / len(some) for some in found.values()]

    def is_whole(self, values: Mapping[tuple[str, int], float]) -> bool:
        """Return whether there is a value for every data set and seed that trained all layers."""
        return {(d, s) for d, s, m, *_ in self.trained if m == ALL} <= set(values)

    def agreed(self, factor: str, method: str) -> list[tuple[Mapping, Mapping]]:
        """Agreements of one method's masks that differ in a factor, else at the usual options."""
        cells = []
        for key, result in self.agreements:
            of = {k: v for k, v in result["of"].items() if k != factor}
            if key["factor"] == factor and of.get("method") == method and self.is_usual(of):
                cells.append((of, result))
        return cells


def _place(key: Mapping[str, Any]) -> tuple[str, int]:
    return key["data"], key["seed"]


def studies(results: Mapping[str, Any]) -> dict[str, Study]:
    """File stem -> study, of every ``study-*.jsonl`` that has a mask."""
    stems = sorted(name for name in results if name.startswith("study-"))
    return {
        stem: Study(results[stem])
        for stem in stems
        if {"mask", "layers"} <= {line["kind"] for line in results[stem]}
    }

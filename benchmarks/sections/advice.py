"""Which layers to train: five sentences from the trainings at best learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.frontier.methods import LAST_MLPS, best_by
from benchmarks.frontier.ways import FULL, Way
from benchmarks.sections.frontier import FIGURE, SAYS, frontier
from benchmarks.sections.frontier_numbers import LITTLE, Frontier, Point, gap, rival
from benchmarks.sections.study_numbers import Estimate

PAGE = "study"
TITLE = "Which layers to train"
ORDER = -1
SAME_TIME = 1.05
Points = Mapping[str, Point]


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the sentences for the top of the page."""
    found = frontier(results)
    sentences = [] if found is None else advice(found)
    return [_setting(found), _listed(sentences)] if sentences else []


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return the sentences for the front page, and the picture of the trainings."""
    shown = markdown(results)
    if not shown:
        return []
    setting, sentences = shown
    return [f"**Which layers to train?** {setting}", sentences, f"![{SAYS}](docs/figures/{FIGURE})"]


def advice(found: Frontier) -> list[str]:
    """Return the sentences that the trainings allow."""
    once, epochs = ({p.way.name: p for p in found.points(part)} for part in ("one pass", "epochs"))
    sentences = [_all(once), _no_qk(once), _one_run(once), _search(once), _epochs(epochs)]
    return [text for text in sentences if text]


def _setting(found: Frontier) -> str:
    key = found.setting("one pass")
    point = next(p for p in found.points("one pass") if p.way == FULL)
    data = ", ".join(point.by_data())
    return (
        f"{key['model']}; data: {data}; {len(point.lost)} pairs of data set and seed, each way at "
        "its own best learning rate. *Time* is that of the whole run, search included; PEFT on all "
        "layers takes 1. *Loses* is the share of the gain of all layers, with its 95 % interval. "
        "Ties are called ties."
    )


def _all(points: Points) -> str | None:
    whole, cut = points.get(FULL.name), points.get(f"{FULL.name}, 0.8 of the steps")
    if whole is None or whole.time is None:
        return None
    rest = "" if cut is None else f"; 0.8 of the steps take {cut.time:.2f} and lose {_lost(cut)}"
    return f"Begin with all layers: the losses of PEFT, in {whole.time:.2f} of its time{rest}."


def _no_qk(points: Points) -> str | None:
    point = points.get("no q and k")
    if point is None:
        return None
    said = point.estimate()
    word = "a tie" if said.low <= 0 <= said.high else "not free"
    return f"Leaving out every q and k, without a search, loses {_lost(point)}: {word}."


def _one_run(points: Points) -> str | None:
    """Take the shortest of the runs that lose little; else the one that loses least."""
    runs = _runs(points)
    if not runs:
        return None
    near = [run for run in runs if run.estimate().mean <= LITTLE]
    run = min(near, key=_time) if near else min(runs, key=lambda p: p.estimate().mean)
    beside = [other for other in runs if other is not run and _rival(points, other)]
    more = min(beside, key=lambda p: p.estimate().mean, default=None)
    said = f"A selection within the run: {_said(points, run)}."
    return said if more is None else f"{said} Or {_said(points, more)}."


def _said(points: Points, run: Point) -> str:
    return f"*{run.way.name}* takes {run.time:.2f} and loses {_lost(run)}{_rival(points, run)}"


def _search(points: Points) -> str | None:
    """Say whether a search chooses better layers than their weights; then what else chooses."""
    best, weights = (points.get(best_by(method, 0.3).name) for method in ("path", "kappa"))
    if best is None:
        return None
    searched = f"{_lost(best)}{_in_time(best, ', its search included')}"
    ways = [best_by("kappa", 0.3), best_by("snr", 0.3), LAST_MLPS, best_by("random", 0.3)]
    if weights is None or not _is_as_good(weights, best):
        said = "A mask of its own is for many runs: the best 30 % by `path`, trained from scratch, "
        return f"{said}lose {searched}.{_beside(points, best, ways)}"
    return (
        "Few layers from the start need no search: the best 30 % by `kappa`, from the weights "
        f"alone, lose {_lost(weights)}{_in_time(weights)}; those by `path` lose {searched}: "
        f"{_verdict(gap(weights, best))}.{_beside(points, best, ways[1:])}"
    )


def _is_as_good(point: Point, other: Point) -> bool:
    """Return whether a point loses less than ``LITTLE`` more, by the end of its interval."""
    return point.lost.keys() == other.lost.keys() and gap(point, other).high < LITTLE


def _beside(points: Points, best: Point, ways: list[Way]) -> str:
    """Return what other ways lose that were trained wherever the best was."""
    others = []
    for way in ways:
        point = points.get(way.name)
        if point is not None and point.lost.keys() == best.lost.keys():
            others.append(f"{_short(way.name)} {_lost(point)}, {_verdict(gap(point, best))}")
    said = f" Chosen otherwise, against `path`: {'; '.join(others)}." if others else ""
    tied = any(text.startswith("`random`") and text.endswith("a tie") for text in others)
    return f"{said} So the search was not shown to beat random layers." if tied else said


def _in_time(point: Point, how: str = "") -> str:
    return "" if point.time is None else f" in {point.time:.2f}{how}"


def _epochs(points: Points) -> str | None:
    runs = [run for run in _runs(points) if run.estimate().mean <= LITTLE]
    if not runs:
        return None
    return f"Over three epochs the cache helps: {_said(points, min(runs, key=_time))}."


def _runs(points: Points) -> list[Point]:
    """Return the runs with a selection that are timed, and trained wherever all layers are."""
    cells = len(points[FULL.name].lost) if FULL.name in points else 0
    found = (point for point in points.values() if point.way.at is not None)
    return [run for run in found if run.time is not None and len(run.lost) == cells > 1]


def _rival(points: Points, run: Point) -> str:
    """Say how all layers do in the same time; nothing where that was not measured."""
    other = rival(list(points.values()), run)
    if other is None or _time(other) > SAME_TIME * _time(run):
        return ""
    word = _verdict(gap(run, other))
    lost = f"{other.estimate().mean * 100:.1f} %"
    said = word if word == "a tie" else f"the run is {word}"
    return f"; *{other.way.name}* takes {other.time:.2f} and loses {lost}: {said}"


def _time(point: Point) -> float:
    return point.time or 0.0


def _verdict(behind: Estimate) -> str:
    if behind.low <= 0 <= behind.high:
        return "a tie"
    return "better" if behind.mean < 0 else "worse"


def _short(name: str) -> str:
    return name.removeprefix("best 30 % by ")


def _lost(point: Point) -> str:
    said = point.estimate()
    return f"{said.mean * 100:.1f} % ({said.low * 100:.1f} … {said.high * 100:.1f})"


def _listed(sentences: list[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(sentences, 1))

"""Which layers to train: five sentences from the trainings at best learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.frontier.methods import best_by
from benchmarks.frontier.ways import FULL, NO_QK
from benchmarks.sections import small_base
from benchmarks.sections.frontier import FIGURE, SAYS, frontier, percent, tenths
from benchmarks.sections.frontier_numbers import Frontier, Point, gap, less_on, rival
from benchmarks.sections.verdict import LITTLE, RULE, word, words

PAGE = "study"
TITLE = "Which layers to train"
ORDER = -1
SAME_TIME = 1.05
CHOICES = tuple(best_by(name, 0.3) for name in ("path", "update_norm", "kappa", "snr"))
Points = Mapping[str, Point]


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the sentences for the top of the page."""
    found = frontier(results)
    sentences = [] if found is None else advice(found, small_base.points(results))
    return [_setting(found), _listed(sentences)] if sentences else []


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return the sentences for the front page, and the picture of the trainings."""
    shown = markdown(results)
    if not shown:
        return []
    setting, sentences = shown
    return [f"**Which layers to train?** {setting}", sentences, f"![{SAYS}](docs/figures/{FIGURE})"]


def advice(found: Frontier, small: Mapping[str, Point] | None = None) -> list[str]:
    """Return the sentences that the trainings allow.

    Args:
        found: Trainings of the large model.
        small: Name -> way of the small base model.
    """
    once, epochs = ({p.way.name: p for p in found.points(part)} for part in ("one pass", "epochs"))
    sentences = [_all(once), _no_qk(once, small or {}), _one_run(once), _few(once), _epochs(epochs)]
    return [text for text in sentences if text]


def _setting(found: Frontier) -> str:
    key = found.setting("one pass")
    point = next(p for p in found.points("one pass") if p.way == FULL)
    data = ", ".join(point.by_data())
    return (
        f"{key['model']}; data: {data}; {len(point.lost)} pairs of data set and seed, each way "
        "trained at its own best rate. *Time* is that of the whole run, search included; PEFT on "
        "all layers takes 1. *Loses* is the share of the gain of all layers, with its 95 % "
        f"interval over the data sets. {RULE}"
    )


def _all(points: Points) -> str | None:
    whole, cut = points.get(FULL.name), points.get(f"{FULL.name}, 0.8 of the steps")
    if whole is None or whole.time is None:
        return None
    rest = "" if cut is None else f"; 0.8 of the steps takes {cut.time:.2f} and {_lose(cut)}"
    return f"Begin with all layers: the losses of PEFT, in {whole.time:.2f} of its time{rest}."


def _no_qk(points: Points, small: Points) -> str | None:
    point, other = points.get(NO_QK.name), small.get(NO_QK.name)
    if point is None:
        return None
    time = "" if point.time is None else f" takes {point.time:.2f} and"
    said = f"Leaving out every q and k{time} {_lose(point)}"
    if other is None:
        return f"{said}: {word(point.estimate())}."
    mean = f"{tenths(other.estimate().mean)} %, the mean of {len(other.by_data())} data sets"
    return (
        f"{said}: {word(point.estimate())}. On a small base model with as many key heads as query "
        f"heads it loses {mean}."
    )


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
    return f"*{run.way.name}* takes {run.time:.2f} and {_lose(run)}{_rival(points, run)}"


def _few(points: Points) -> str | None:
    """Say what each choice of 30 % loses, against random layers."""
    chance, path, kappa = (points.get(best_by(by, 0.3).name) for by in ("random", "path", "kappa"))
    if chance is None:
        return None
    ways = [points[way.name] for way in CHOICES if way.name in points]
    ways = [way for way in ways if way.lost.keys() == chance.lost.keys()]
    told = words([gap(way, chance) for way in ways])
    parts = [_choice(way, said) for way, said in zip(ways, told, strict=True)]
    begin = f"Few layers from the start: 30 % at random lose {percent(chance.estimate())}."
    against = f" Against them, the best 30 % by {'; '.join(parts)}." if parts else ""
    both = ""
    if path in ways and kappa in ways:
        both = f" `kappa` against `path`: {word(gap(kappa, path))}."
    better = " None was shown to beat chance." if parts and "better" not in told else ""
    return f"{begin}{against}{both}{better}"


def _choice(point: Point, said: str) -> str:
    notes = [f"in {point.time:.2f}"] if point.time is not None else []
    notes += ["with its search" if notes else "its search is a whole run"] * point.way.search
    notes += ["from the weights alone"] if point.way.by_weights else []
    how = f" ({', '.join(notes)})" if notes else ""
    return f"`{point.way.scored_by}`{how} lose {percent(point.estimate())}: {said}"


def _epochs(points: Points) -> str | None:
    runs = [run for run in _runs(points) if run.estimate().mean <= LITTLE]
    if not runs:
        return None
    return f"Over three epochs, with the cache: {_said(points, min(runs, key=_time))}."


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
    said = word(gap(run, other))
    said = f"the run is {said}" if said in ("better", "worse") else said
    return (
        f"; *{other.way.name}* takes {other.time:.2f} and {_lose(other)}: {said} (the run loses "
        f"less on {less_on(run, other)})"
    )


def _time(point: Point) -> float:
    return point.time or 0.0


def _lose(point: Point) -> str:
    """Say that a way loses a share of the gain, or that it gains more."""
    said = point.estimate()
    if round(said.mean, 3) >= 0.0:
        return f"loses {percent(said)}"
    more = replace(said, mean=-said.mean, low=-said.high, high=-said.low)
    return f"gains {percent(more)} more"


def _listed(sentences: list[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(sentences, 1))

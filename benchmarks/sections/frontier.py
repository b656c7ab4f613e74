"""Held-out loss against total time, search included: which way to train pays?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.frontier.methods import METHODS, best_by
from benchmarks.frontier.ways import FULL
from benchmarks.sections.common import BLUE, GREY, INK, ORANGE, RED, picture, save, table
from benchmarks.sections.frontier_numbers import Frontier, Point, gap, rival
from benchmarks.sections.pieces import untitled

PAGE = "study"
TITLE = "Which way to train pays: loss against total time"
ORDER = 1
FIGURE, SAYS = "frontier.png", "Share of the gain lost against total time"
PARTS = {"one pass": "One pass: no row is seen twice", "epochs": "Three epochs over few rows"}


def frontier(results: Mapping[str, Any]) -> Frontier | None:
    """Return the trainings, None where there are none."""
    return Frontier(results["frontier"]) if "frontier" in results else None


def _ways(found: Frontier, part: str) -> list[Point]:
    """Return the points of a part, less those that compare ways to choose few layers."""
    return [point for point in found.points(part) if point.way not in METHODS]


def _complete(points: list[Point]) -> list[Point]:
    """Return the points that are timed, and trained wherever all layers are."""
    cells = max((len(point.lost) for point in points), default=0)
    return [point for point in points if point.time is not None and len(point.lost) == cells]


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of the page."""
    found = frontier(results)
    if found is None:
        return []
    parts = [_rule(found), picture(FIGURE, SAYS)]
    for part in found.parts:
        points = _ways(found, part)
        parts += [f"**{PARTS[part]}.** {_setting(found, part)}", _table(points)]
        parts += [text for text in ["\n".join(verdicts(points)), break_even(found, part)] if text]
    return parts


def _rule(found: Frontier) -> str:
    key = found.setting(found.parts[0])
    return (
        f"{key['model']}, rank {key['rank']}, {key['batch_rows']} rows of at most "
        f"{key['max_length']} tokens a step, {key['full']} steps in a full run "
        "(`python -m benchmarks.frontier --help`). *Gain* is the loss that training all layers "
        "takes off on held-out rows. Every way is at its own learning rate: the best on the first "
        "seed of each data set, used for the other seeds too. Total time counts every step, the "
        "scores and the cache; step times were measured in turns, as CPU time of one thread, and "
        "are relative to PEFT on all layers with transformers' loss. PEFT's layers give the same "
        "losses as ours with all layers open, so one training stands for both. `kappa` and `snr` "
        "score layers by the singular values of their weights; the scan counts." + _repeated(found)
    )


def _repeated(found: Frontier) -> str:
    """Say how far trainings changed that ran again on another processor."""
    changes = found.repeats()
    if not changes:
        return ""
    return (
        f" Trainings ran on two processors; {len(changes)} that ran on both differ by "
        f"{min(changes) * 100:+.1f} … {max(changes) * 100:+.1f} % of the gain."
    )


def _setting(found: Frontier, part: str) -> str:
    cells = {
        (key["data"], key["seed"]) for key, _ in found.lines["frontier"] if key["part"] == part
    }
    data = list(dict.fromkeys(name for name, _ in sorted(cells)))
    return (
        f"{found.rows(part)} rows to train on at most; data: {', '.join(data)}; {len(cells)} pairs "
        "of data set and seed. In brackets: 95 % intervals over these pairs."
    )


def _table(points: list[Point]) -> str:
    lines = []
    for point in points:
        said = point.estimate()
        lines.append(
            [
                point.way.name,
                "not measured" if point.time is None else f"{point.time:.2f}",
                f"{said.mean * 100:+.1f} % ({said.low * 100:+.1f} … {said.high * 100:+.1f})"
                if said.count > 1
                else f"{said.mean * 100:+.1f} %",
                ", ".join(f"{rate * 1e3:g}" for rate in point.rates.values()),
                str(said.count),
            ]
        )
    peft = ["PEFT, all layers", "1.00", lines[0][2], lines[0][3], lines[0][4]]
    header = ["", "total time", "share of the gain lost", "best rate, 10⁻³", "runs"]
    return table(header, [peft, *lines])


def verdicts(points: list[Point]) -> list[str]:
    """Return a sentence for each way but all layers, against all layers in as much time."""
    lines = []
    for point in points:
        other = rival(points, point)
        if point.way.opened == "all" or other is None:
            continue
        said = gap(point, other)
        if said.count < 2:
            continue
        worse = sum(value > other.by_data()[data] for data, value in point.by_data().items())
        word = "a tie" if said.low <= 0 <= said.high else "worse" if said.mean > 0 else "better"
        lines.append(
            f"- *{point.way.name.capitalize()}* takes {point.time:.2f} of PEFT's time. Against "
            f"this library on *{other.way.name}* ({other.time:.2f}) it loses "
            f"{said.mean * 100:+.1f} % of the gain ({said.low * 100:+.1f} … "
            f"{said.high * 100:+.1f}): {word}; worse on {worse} of {len(point.by_data())} data "
            "sets."
        )
    return lines


def break_even(found: Frontier, part: str) -> str | None:
    """Say from which training on a learned mask the search has paid for itself in time."""
    way = best_by("path", 0.3)
    ways = (FULL, way, replace(way, search=False))
    times = [found.times(part, each).values() for each in ways]
    if not all(times):
        return None
    whole, total, alone = map(fmean, times)
    said = (
        f"To learn a mask by `path` takes {total - alone:.2f} of PEFT's time. A training on the "
        f"best 30 % takes {alone:.2f}, one on all layers {whole:.2f}: "
    )
    if alone >= whole:
        return f"{said}the search never pays for itself in time."
    runs = math.ceil((total - alone) / (whole - alone))
    return f"{said}the search has paid for itself in time after {runs} trainings on its mask."


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Return the picture: a panel for each part."""
    found = frontier(results)
    return {} if found is None else {FIGURE: partial(_draw, found)}


def _draw(found: Frontier, path: Path) -> None:
    figure, axes = untitled(1, len(found.parts), size=(5.6 * len(found.parts), 4.2))
    for axis, part in zip(axes[0], found.parts, strict=True):
        points = _complete(_ways(found, part))
        whole = sorted(
            (point for point in points if point.way.opened == "all"), key=lambda p: p.time or 0.0
        )
        axis.plot(
            [point.time for point in whole],
            [point.estimate().mean * 100 for point in whole],
            color=GREY,
            linewidth=1,
        )
        for point in points:
            _mark(axis, point)
        axis.plot([1.0], [0.0], "s", color=RED, markersize=7)
        axis.annotate(
            "PEFT, all layers",
            (1.0, 0.0),
            (4, -25),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=INK,
        )
        axis.axhline(0, color=GREY, linewidth=0.8)
        times = [1.0, *(point.time for point in points)]
        axis.set_xlim(min(times) - 0.05, max(times) + (0.08 if max(times) == 1.0 else 0.35))
        axis.set_title(PARTS[part], loc="left", fontsize=11, color=INK)
        axis.set_xlabel("total time, PEFT on all layers = 1", color=INK)
        axis.set_ylabel("gain lost, %", color=INK)
    save(figure, path)


def _mark(axis: Any, point: Point) -> None:
    """Draw a point with its interval and its name."""
    said = point.estimate()
    kind = "all" if point.way.opened == "all" else "run" if point.way.at else "scratch"
    colour = {"all": GREY, "run": BLUE, "scratch": ORANGE}[kind]
    half = [[(said.mean - said.low) * 100], [(said.high - said.mean) * 100]]
    bars = half if said.count > 1 else None
    axis.errorbar([point.time], [said.mean * 100], yerr=bars, fmt="o", color=colour, capsize=2)
    below = point.way == FULL or said.mean < 0
    place = {
        "xytext": (4, -13) if below else (6, 4),
        "textcoords": "offset points",
        "fontsize": 8.5,
        "color": INK,
    }
    axis.annotate(point.way.name, (point.time, said.mean * 100), **place)

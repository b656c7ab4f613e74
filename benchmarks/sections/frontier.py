"""Held-out loss against total time, search included: which way to train pays?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.frontier.methods import METHODS, best_by
from benchmarks.frontier.ways import FULL, ONE_PASS, Way
from benchmarks.sections.common import BLUE, GREY, INK, ORANGE, RED, picture, save, table
from benchmarks.sections.frontier_numbers import Frontier, Point, gap, less_on, rival
from benchmarks.sections.pieces import untitled
from benchmarks.sections.study_numbers import Estimate
from benchmarks.sections.verdict import RULE, words

PAGE = "study"
TITLE = "Which way to train pays: loss against total time"
ORDER = 1
FIGURE, SAYS = "frontier.png", "Share of the gain lost against total time"
RUN = next(way for way in ONE_PASS if way.name == "one run, last 22 blocks")
COSTED = (*(best_by(method, 0.3) for method in ("path", "kappa", "snr")), RUN)
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
        parts += [text for text in ["\n".join(verdicts(points)), *costs(found, part)] if text]
    return parts


def _rule(found: Frontier) -> str:
    key = found.setting(found.parts[0])
    return (
        f"{key['model']}, rank {key['rank']}, {key['batch_rows']} rows of at most "
        f"{key['max_length']} tokens a step, {key['full']} steps in a full run "
        "(`python -m benchmarks.frontier --help`). *Gain* is the loss that training all layers "
        "takes off on held-out rows. Every way trains at its own learning rate: the best on the "
        "first seed of each data set, used for the other seeds too. The first seed counts as well, "
        f"so losses are slightly low.{_search_rate(found)} Total time counts every step, the "
        "scores and the cache. Step times were measured in turns, as CPU time of one "
        f"thread ({_rounds(found)} rounds), and are relative to PEFT on all layers with "
        "transformers' loss. PEFT's layers give the same losses as ours with all layers open, so "
        "they were not trained twice. `kappa` and `snr` score layers by the singular values of "
        "their weights; the scan counts. Intervals are 95 %, with data sets as the replicates: a "
        f"data set counts once, by the mean over its seeds. {RULE} Tool use has near copies on "
        "both sides of the split ([how many](guide.md#options-of-the-training)), so there a loss "
        "measures memory too." + _repeated(found)
    )


def _search_rate(found: Frontier) -> str:
    """Say at which rate the searches trained: theirs was not tuned."""
    rates = {key["learning_rate"] for key, _ in found.lines["mask"] if key.get("milestone")}
    said = " and ".join(f"{rate * 1e3:g}·10⁻³" for rate in sorted(rates))
    return f" Searches train at {said}, which was not tuned." if said else ""


def _rounds(found: Frontier) -> int:
    return max((key.get("rounds", 1) for key, _ in found.lines["frontier times"]), default=0)


def _repeated(found: Frontier) -> str:
    """Say how far trainings changed that ran again on another processor."""
    changes = found.repeats()
    if not changes:
        return ""
    return (
        f" Trainings ran on two processors; {len(changes)} that ran on both differ by "
        f"{signed(min(changes))} … {signed(max(changes))} % of the gain."
    )


def _setting(found: Frontier, part: str) -> str:
    cells = {
        (key["data"], key["seed"]) for key, _ in found.lines["frontier"] if key["part"] == part
    }
    data = list(dict.fromkeys(name for name, _ in sorted(cells)))
    key, rows = found.setting(part), found.rows(part)
    read = key["full"] * key["batch_rows"]
    how = (
        f"{read} of {rows} rows, each once" if read <= rows else f"{rows} rows, {read / rows:.3g}×"
    )
    return (
        f"A full run reads {how}; data: {', '.join(data)}; {len(cells)} pairs of data set and seed."
    )


def _table(points: list[Point]) -> str:
    lines = [
        [
            point.way.name,
            "not measured" if point.time is None else f"{point.time:.2f}",
            percent(point.estimate()),
            each(point),
            ", ".join(f"{rate * 1e3:g}" for rate in point.rates.values()),
            str(len(point.lost)),
        ]
        for point in points
    ]
    peft = ["PEFT, all layers", "1.00", *lines[0][2:]]
    header = ["", "total time", "gain lost", "by data set, %", "best rate, 10⁻³", "runs"]
    return table(header, [peft, *lines])


def percent(said: Estimate) -> str:
    """Return a share in percent with its interval; a mean alone has none."""
    mean, low, high = map(tenths, (said.mean, said.low, said.high))
    return f"{mean} %" if said.count < 2 or said.error == 0.0 else f"{mean} % ({low} … {high})"


def tenths(share: float) -> str:
    """Return a share in percent, with one digit and no -0.0.

    >>> tenths(-0.0004), tenths(0.0123)
    ('0.0', '1.2')
    """
    return f"{round(share, 3) * 100 + 0.0:.1f}"


def signed(share: float) -> str:
    """Return a share in percent with its sign.

    >>> signed(0.0123), signed(-0.0004)
    ('+1.2', '+0.0')
    """
    return f"{round(share, 3) * 100 + 0.0:+.1f}"


def each(point: Point) -> str:
    """Return the share lost on each data set, in percent."""
    return ", ".join(tenths(value) for value in point.by_data().values())


def verdicts(points: list[Point]) -> list[str]:
    """Return a sentence for each way but all layers, against all layers in as much time."""
    pairs = [(point, rival(points, point)) for point in points if point.way.opened != "all"]
    pairs = [(one, other) for one, other in pairs if other and len(one.by_data()) > 1]
    told = words([gap(one, other) for one, other in pairs])
    return [_verdict(one, other, word) for (one, other), word in zip(pairs, told, strict=True)]


def _verdict(point: Point, other: Point, word: str) -> str:
    said = gap(point, other)
    which = "less" if said.mean < 0 else "more"
    return (
        f"- *{point.way.name.capitalize()}* takes {point.time:.2f} of PEFT's time; this library on "
        f"*{other.way.name}* takes {other.time:.2f}. The first loses {abs(said.mean) * 100:.1f} % "
        f"{which} of the gain (difference {signed(said.low)} … {signed(said.high)}): {word} (less "
        f"on {less_on(point, other)})."
    )


def costs(found: Frontier, part: str) -> list[str]:
    """Return what scores and trainings take, end to end, and when few layers have paid."""
    whole = found.times(part, FULL)
    rows = [row for way in COSTED if (row := _cost(found, part, way, whole))]
    if not rows:
        return []
    header = ["", "scores, once", "each training", "one, in all", "shorter than all layers from"]
    time = f"{fmean(whole.values()):.2f}"
    return [
        "What a choice costs, search included; PEFT's time on all layers is 1. The last column "
        "counts trainings that share one choice: from that one on, scores and trainings together "
        "took less time than as many trainings of all layers (range over data sets, of few rounds "
        "of timing). The gain that few layers lose stands above.",
        table(header, [[FULL.name, "0.00", time, time, ""], *rows]),
    ]


def _cost(found: Frontier, part: str, way: Way, whole: Mapping[str, float]) -> list[str] | None:
    both = found.costs(part, way)
    if not both or not whole:
        return None
    first, one = (fmean(values) for values in zip(*both.values(), strict=True))
    runs = sorted(
        math.floor(before / (whole[data] - time)) + 1 if time < whole[data] else math.inf
        for data, (before, time) in both.items()
    )
    low, high = runs[0], runs[-1]
    said = f"training {low}" if low == high else f"training {low} … {high}"
    if high == math.inf:
        said = "never" if low == math.inf else "never on some data"
    return [way.name, f"{first:.2f}", f"{one:.2f}", f"{first + one:.2f}", said]


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

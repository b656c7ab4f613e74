"""The budgeted selection against the plain top-k of the same time, from ``benchmarks.budget``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.sections.common import table
from benchmarks.sections.pieces import quietness
from ila.reports.figures import save_png
from ila.reports.pareto import pareto_figure

PAGE = "study"
TITLE = "A selection that knows its price"
FIGURE = "pareto.png"
_ALL, _BLUE, _ORANGE = "all layers", "#2f6db3", "#d9822b"


def markdown(results: Mapping[str, Any]) -> list[str]:
    """The paragraphs of the page; none where nothing was measured."""
    result = results.get("budget")
    if result is None:
        return []
    options, where = result["options"], result["speed"]["measured"]
    unseen = sum(not row["seen"] for row in where["steps"].values())
    prediction = result["prediction"]
    return [
        f"`ila select --budget` weighs importance (the sum of the scores of method `path`) "
        f"against the time of a step. On {options['model']}, {where['dtype']}, {where['rows']} "
        f"rows of {where['length']} tokens, {where['device'].upper()}, threads: "
        f"{where['threads']}, "
        f"the time it predicts for {unseen} random masks that the fit had not seen correlates "
        f"{prediction['correlation']:.3f} with the time measured, and is off by "
        f"{prediction['worst_error']:.1%} at worst.",
        f"![Importance kept against the time of a step](figures/{FIGURE})",
        f"Each budget below is what the plain top share takes by count. Steps were timed in turn, "
        f"{options['rounds']} rounds. {quietness(result)} Each was then trained from scratch "
        f"on {options['data']}, {options['steps']} steps, seeds: {options['seeds']} "
        "(`python -m benchmarks.budget`). Every seed holds out the rows that the search held out, "
        "and draws the adapter and the order. The last rows train all layers for as many steps as "
        "fit into the selection's time.",
        _table(result),
        "\n".join(comparisons(result)),
    ]


def comparisons(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each budget: how far it is ahead of its rivals, seed by seed."""
    lines, step_ms = [], result["step_ms"]
    for name in result["contestants"]:
        if not name.startswith("as top "):
            continue
        plain, whole = name.removeprefix("as "), f"{_ALL} in the time of {name}"
        parts = [
            f"{_gains(result, name, rival)} against {title}"
            for rival, title in ((plain, f"the {_title(plain)}"), (whole, "all layers in its time"))
            if _pairs(result, name, rival)
        ]
        took = step_ms[name] / step_ms[plain]
        if parts:
            lines.append(
                f"- {_title(name).capitalize()}, whose step took {took:.2f} of the plain one's: "
                f"held-out loss {' and '.join(parts)}."
            )
    return lines


def _pairs(result: Mapping[str, Any], name: str, rival: str) -> list[tuple[str, float, float]]:
    ours, theirs = (losses(result, which) for which in (name, rival))
    return [(seed, ours[seed], theirs[seed]) for seed in ours if seed in theirs]


def _gains(result: Mapping[str, Any], name: str, rival: str) -> str:
    pairs = _pairs(result, name, rival)
    each = ", ".join(f"{ours - theirs:+.4f}" for _, ours, theirs in pairs)
    return f"{each} (seed {', '.join(seed for seed, _, _ in pairs)})"


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """The Pareto curve with the sets that were trained."""
    result = results.get("budget")
    return {} if result is None else {FIGURE: lambda path: _draw(result, path)}


def losses(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """Seed -> held-out loss of a contestant after training."""
    start = f"{name.replace(' ', '-')}-seed-"
    runs = {n: run for n, run in result["trained"].items() if n.startswith(start)}
    return {n.removeprefix(start): runs[n]["held_out_loss"] for n in sorted(runs)}


def _table(result: Mapping[str, Any]) -> str:
    lines: list[list[str]] = []
    step_ms, steps = result["step_ms"], result["options"]["steps"]
    for name, row in result["contestants"].items():
        took = step_ms[name] / step_ms[_ALL]
        cells = [_title(name), row["layers"], f"{row['importance_share']:.0%}"]
        cells += [f"{row['time']:.3f}", f"{took:.3f}", steps, _loss(losses(result, name))]
        lines.append([str(cell) for cell in cells])
    for name in result["contestants"]:
        rival = f"{_ALL} in the time of {name}"
        if losses(result, rival):
            row = result["contestants"][_ALL]
            fewer = round(steps * step_ms[name] / step_ms[_ALL])
            cells = [f"all layers, in the time of {_title(name)}", row["layers"], "100%", "1", "1"]
            cells += [fewer, _loss(losses(result, rival))]
            lines.append([str(cell) for cell in cells])
    header = ["", "layers", "importance", "time, counted", "time, measured", "steps"]
    return table([*header, "held-out loss"], lines)


def _title(name: str) -> str:
    if name.startswith("as top "):
        return f"budget of the top {float(name[7:]):.0%}"
    return f"plain top {float(name[4:]):.0%}" if name.startswith("top ") else name


def _loss(by_seed: Mapping[str, float]) -> str:
    values = list(by_seed.values())
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _draw(result: Mapping[str, Any], path: Path) -> None:
    marks = []
    for name, row in result["contestants"].items():
        if name != _ALL:
            colour = _BLUE if name.startswith("as top") else _ORANGE
            label = f"{row['layers']} layers"
            marks.append((row["time"], row["importance_share"], label, colour))
    save_png(pareto_figure(result["curves"], "time", marks), path)

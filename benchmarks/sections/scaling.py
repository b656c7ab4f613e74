"""How cost grows: slopes with their spread, and one panel for each axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.sections.common import save, table
from benchmarks.sections.pieces import COLOURS, by_device, machine, quietness, untitled

TITLE = "How cost grows"
COMMAND = "`pytest benchmarks/test_scaling.py`"
# Sweep in the file -> its name in the table, the axis of its panel, one step along that axis.
AXES = {
    "tokens": ("tokens", "Tokens of a batch", "token"),
    "rank": ("rank", "Rank of the adapters", "rank"),
    "depth": ("depth", "Blocks of the model", "block"),
    "open layers, from the top": (
        "open layers, the last ones", "Open linear layers, the last ones", "layer",
    ),
}  # fmt: skip


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs for the page of benchmarks."""
    return by_device(results, "scaling", _one)


def _one(document: Mapping[str, Any]) -> list[str]:
    cell = next(iter(document["cells"].values()))
    lines = []
    for row in (r for r in document["rows"] if r.get("fit")):
        name, _, step = AXES[row["sweep"]]
        spread = f"{row['slope_ms']:.3g} ({row['slope_p10_ms']:.3g}–{row['slope_p90_ms']:.3g})"
        lines.append(
            [
                f"{name}, {row['kind']}", f"{spread} ms per {step}",
                f"{row['intercept_ms']:.3g} ms", f"{100 * row['bend']:.0f} %",
            ]
        )  # fmt: skip
    return [
        f"Lines through the time of a training step: the first blocks of {cell['model']}, "
        f"{cell['dtype']}; {machine(document)}; {cell['rounds']} interleaved rounds, a line fitted "
        f"to each, its slope's median with p10–p90 ({COMMAND}). Bend is the largest distance of a "
        f"point from the line as a share of the range: 0 is linear. {quietness(document)}",
        table(["", "slope", "at zero", "bend"], lines),
    ]


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """One figure of four panels for each device that was measured."""
    return {
        f"{stem}.png": lambda path, d=results[stem]: _draw(d, path)
        for stem in ("scaling", "scaling-gpu")
        if stem in results
    }


def _draw(document: Mapping[str, Any], path: Path) -> None:
    figure, axes = untitled(2, 2, (9.0, 6.8))
    cell = next(iter(document["cells"].values()))
    for axis, (sweep, (_, label, _)) in zip(axes.flat, AXES.items(), strict=True):
        rows = [row for row in document["rows"] if row["sweep"] == sweep]
        for kind in ("PEFT", "ours"):
            points = [r for r in rows if r["kind"] == kind and not r.get("fit")]
            fit = next((r for r in rows if r["kind"] == kind and r.get("fit")), None)
            if fit is None:
                continue
            colour, xs = COLOURS[kind], [r["x"] for r in points]
            ys = [r["median_ms"] for r in points]
            low = [r["median_ms"] - r["p10_ms"] for r in points]
            high = [r["p90_ms"] - r["median_ms"] for r in points]
            axis.errorbar(xs, ys, yerr=[low, high], fmt="o", color=colour, capsize=3)
            ends = [0, max(xs)]
            line = [fit["intercept_ms"] + fit["slope_ms"] * x for x in ends]
            axis.plot(ends, line, color=colour, label=kind)
        axis.set(xlabel=label, ylabel="ms per training step", xlim=(0, None), ylim=(0, None))
        axis.margins(x=0.12)
    axes[0, 0].legend(frameon=False, loc="upper left")
    where = document["environment"].get("gpu") or f"{document['environment']['threads']} CPU cores"
    figure.suptitle(
        f"How the cost of a training step grows: {cell['model']}, first blocks, {where}",
        x=0.01,
        ha="left",
    )
    save(figure, path)

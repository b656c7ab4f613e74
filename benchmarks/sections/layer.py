"""One layer: ratios of every contestant by cell, and a roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.sections.common import save, table
from benchmarks.sections.pieces import COLOURS, by_device, machine, quietness, share, untitled

TITLE = "One layer"
COMMAND = "`pytest benchmarks/test_layer.py`"
# Whose share of the roofline stands beside ours.
SPEEDS = ("ours, hybrid", "ours, Triton", "PEFT", "frozen")


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs for the page of benchmarks."""
    return by_device(results, "layer", _one)


def _one(document: Mapping[str, Any]) -> list[str]:
    cell = next(iter(document["cells"].values()))
    best = cell["ceiling"]
    return [
        f"Forward and backward, base in {cell['dtype']} with {cell['adapters']} adapters; time "
        "relative to PEFT's layer in the same round, median with p10–p90. Outputs and "
        "gradients were held to fp64 before. The share of the roofline is the least time the "
        f"mathematics allows ({best['bf16_tflops']:.2f} TFLOP/s, {best['memory_gb_s']:.0f} "
        f"GB/s, {best['source']}) over the time taken; what fits into a cache can exceed it. "
        f"{machine(document)}; {cell['rounds']} interleaved rounds ({COMMAND}). "
        f"{quietness(document)}",
        _pivot(document["rows"]),
        _phases(document["rows"]),
    ]


def _pivot(rows: list[Mapping[str, Any]]) -> str:
    """A line for each cell, a column for each contestant."""
    rows = [row for row in rows if row["phase"] == "both"]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    names = [n for n in dict.fromkeys(row["contestant"] for row in rows) if n != "PEFT"]
    by = {(row["cell"], row["contestant"]): row for row in rows}
    lines = []
    for cell in cells:
        peft, ours = by[cell, "PEFT"], by[cell, "ours"]
        line = [cell, f"{peft['median_ms']:.3g}"]
        for name in names:
            row = by.get((cell, name))
            line.append(
                share(row["ratio_to_peft"], row["p10"], row["p90"]) if row is not None else ""
            )
        percent = ours["share_of_roofline"]
        line.append("" if percent is None else f"{100 * percent:.0f} %")
        line.append(f"{ours['peak_bytes'] / peft['peak_bytes']:.2f}")
        lines.append(line)
    header = ["", "PEFT, ms", *names, "roofline, ours", "peak bytes, ours / PEFT's"]
    return table(header, lines)


def _phases(rows: list[Mapping[str, Any]]) -> str:
    """Forward and backward apart: speeds of ours, and the shares of the roofline beside it."""
    by = {(row["cell"], row["phase"], row["contestant"]): row for row in rows}
    beside = [name for name in SPEEDS if any(name == key[2] for key in by)]
    lines = []
    for (cell, phase, name), row in by.items():
        plain = row["gate"] is None and not row["dropout"] and row["tflop_s"] is not None
        if name != "ours" or phase == "both" or not plain:
            continue
        others = [by.get((cell, phase, other)) for other in beside]
        lines.append(
            [
                f"{cell}, {phase}", f"{row['median_ms']:.3g}", f"{row['tflop_s']:.3g}",
                f"{row['gb_s']:.3g}", f"{100 * row['share_of_roofline']:.0f} %",
                *("" if o is None else f"{100 * o['share_of_roofline']:.0f} %" for o in others),
            ]
        )  # fmt: skip
    header = ["", "ours, ms", "TFLOP/s", "GB/s", "of the roofline, ours"]
    return table(header + beside, lines)


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """The roofline of each device that was measured."""
    return {
        f"roofline{stem.removeprefix('layer')}.png": lambda path, d=results[stem]: _draw(d, path)
        for stem in ("layer", "layer-gpu")
        if stem in results
    }


SHOWN = (
    ("frozen", "frozen", "s", "frozen linear, no adapter"),
    ("PEFT", "PEFT", "v", "PEFT"),
    ("ours", "ours", "o", "ours"),
    ("ours, hybrid", "ours, cache", "P", "ours, thin products in Triton"),
    ("ours, Triton", "second", "D", "ours, Triton kernels"),
)


def _draw(document: Mapping[str, Any], path: Path) -> None:
    rows = [r for r in document["rows"] if r["phase"] == "both" and r["tflop_s"] is not None]
    rows = [r for r in rows if r["gate"] is None and not r["dropout"]]
    best = next(iter(document["cells"].values()))["ceiling"]
    peak, bandwidth = best["bf16_tflops"], best["memory_gb_s"] / 1e3
    figure, axes = untitled(size=(8.5, 5.2))
    axis = axes[0, 0]
    axis.set(xscale="log", yscale="log")
    xs = [r["flop_per_byte"] for r in rows]
    low, high = min(xs) / 2, max([*xs, 2 * peak / bandwidth]) * 2
    knee = peak / bandwidth
    axis.plot([low, knee, high], [low * bandwidth, peak, peak], color="black", linewidth=1.5)
    where = "measured" if best["source"] == "measured" else "data sheet"
    axis.annotate(
        f"best product of matrices: {peak:.3g} TFLOP/s ({where})", (high, peak), (0, 4),
        textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    axis.annotate(
        f"best copy: {1e3 * bandwidth:.0f} GB/s", (knee / 8, peak / 8), (-8, 4),
        textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    for name, colour, marker, label in SHOWN:
        own = [r for r in rows if r["contestant"] == name]
        if own:
            axis.plot(
                [r["flop_per_byte"] for r in own], [r["tflop_s"] for r in own], marker,
                color=COLOURS[colour], label=label, markersize=6, alpha=0.8,
            )  # fmt: skip
    axis.legend(loc="lower right", frameon=False)
    axis.set_xlabel("FLOP per byte that has to be moved")
    axis.set_ylabel("TFLOP/s, forward and backward")
    gpu = document["environment"].get("gpu")
    where = gpu or f"{document['environment']['threads']} CPU cores"
    axis.set_title(
        f"One LoRA layer against what the machine allows\nbf16, {where}; one point for each shape",
        loc="left",
    )
    save(figure, path)

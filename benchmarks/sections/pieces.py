"""What the sections share: sentences on a run, tables, and the look of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart by everybody.
COLOURS = {
    "ours": "#0072B2", "ours, cache": "#56B4E9", "PEFT": "#D55E00", "frozen": "#555555",
    "other": "#CC79A7", "second": "#009E73",
}  # fmt: skip
NOT_MEASURED = "not measured"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | ---: |
    | 1 | 2 |
    """
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(document: Mapping[str, Any]) -> str:
    """On what a run was: device, threads, library versions that matter, clock."""
    where, options = document["environment"], document["options"]
    device = where.get("gpu") or f"CPU ({where['processor']}), {where['threads']} threads"
    clock = {"cpu": "CPU time", "wall": "wall time", "events": "GPU time"}[options["clock"]]
    versions = where["versions"]
    return f"{device}; torch {versions['torch']}, PEFT {versions['peft']}; {clock}"


def quietness(document: Mapping[str, Any]) -> str:
    """Say whether somebody else used the machine meanwhile."""
    busy = document["busy"]
    if busy["busy"]:
        return f"**The machine was busy while this was measured**: {'; '.join(busy['why'])}."
    return f"The machine was quiet (calibration spread {busy['spread']:.2f})."


def share(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A ratio with its p10 and p90.

    >>> share(0.5, 0.45, 0.6), share(None)
    ('0.50 (0.45–0.60)', '')
    """
    if value is None:
        return ""
    if low is None or high is None or low == high == value:
        return f"{value:.2f}"
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def mebibytes(value: int | None) -> str:
    """Bytes as MiB; they come from the allocator's own record.

    >>> mebibytes(2**21)
    '2 MiB'
    """
    return NOT_MEASURED if value is None else f"{value / 2**20:,.0f} MiB"


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.0, 5.0)):
    """A figure and its axes: light, without a frame, for print and screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a PNG; the same figure gives the same bytes."""
    figure.savefig(path, dpi=150, metadata={"Software": None})

"""What the sections of timed results share: sentences on a run, ratios, colours by contestant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness.session import SYSTEM_ALLOCATOR
from benchmarks.sections.common import BLUE, GREEN, INK, NOT_MEASURED, PURPLE, RED, SKY, style

COLOURS = {
    "ours": BLUE, "ours, cache": SKY, "PEFT": RED, "frozen": INK, "other": PURPLE, "second": GREEN,
}  # fmt: skip


def machine(document: Mapping[str, Any]) -> str:
    """On what a run was: device, threads, allocator, library versions that matter, clock."""
    where, options = document["environment"], document["options"]
    device = where.get("gpu") or f"CPU ({where['processor']}), threads: {where['threads']}"
    if (allocator := where.get("allocator", SYSTEM_ALLOCATOR)) != SYSTEM_ALLOCATOR:
        device += f", allocator: {allocator}"
    clock = {"cpu": "CPU time", "wall": "wall time", "events": "GPU time"}[options["clock"]]
    versions = where["versions"]
    return f"{device}; torch {versions['torch']}, PEFT {versions['peft']}; {clock}"


def quietness(document: Mapping[str, Any]) -> str:
    """Say whether somebody else used the machine meanwhile."""
    busy = document["busy"]
    if busy["busy"]:
        return f"**The machine was busy while this was measured**: {'; '.join(busy['why'])}."
    return f"The machine was quiet (calibration spread {busy['spread']:.2f})."


def left_out(document: Mapping[str, Any]) -> str:
    """Name contestants of a run that did not run, or computed something else, and why."""
    said = [
        f"{name} ({cell}): {why.splitlines()[0]}"
        for cell, conditions in document["cells"].items()
        for name, why in conditions.get("left_out", {}).items()
    ]
    return f" Left out: {'; '.join(said)}." if said else ""


def by_device(
    results: Mapping[str, Any], stem: str, one: Callable[[Mapping[str, Any]], list[str]]
) -> list[str]:
    """The paragraphs that ``one`` makes of a CPU's and a GPU's result; of neither, none."""
    stems = (("CPU", stem), ("GPU", f"{stem}-gpu"))
    if not any(name in results for _, name in stems):
        return []
    parts: list[str] = []
    for title, name in stems:
        parts += one(results[name]) if name in results else [f"On a {title}: {NOT_MEASURED}."]
    return parts


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


def untitled(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.0, 5.0)):
    """A figure without a title above it, and its axes as a grid: each gets a title of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        style(axis)
    return figure, axes

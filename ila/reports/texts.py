"""Metrics of runs as short texts, for tables and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any


def baseline_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the run that others are compared with: the first with the most layers open."""
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    return max(runs, key=lambda run: run["open_modules"])  # max returns the first of equals


def ratio_text(value: float | None, base: float | None) -> str:
    """Write ``(0.50x)``, or nothing where one of the two is not known."""
    return "" if value is None or not base else f" ({value / base:.2f}x)"


def loss_text(value: float | None) -> str:
    """Write a loss in nats with three decimals."""
    return "not measured" if value is None else f"{value:.3f}"


def ms_text(value: float) -> str:
    """Write milliseconds, with a decimal below a thousand."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def gib_text(value: int | None) -> str:
    """Write bytes in GiB with two decimals."""
    return "not measured" if value is None else f"{value / 2**30:.2f}"

"""Straight lines through medians and rounds: slopes with the spread of their rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.harness.timing import quantile


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least squares: (slope, intercept).

    >>> line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    (2.0, 1.0)
    """
    slope, intercept = statistics.linear_regression(xs, ys)
    return slope, intercept


def fitted(xs: Sequence[float], rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """A line through every round, and how far from a line the medians are.

    Args:
        xs: The points.
        rounds: For every point its times in ms, one a round; a round has all points.

    Returns:
        ``slope_ms`` and ``intercept_ms``, medians over the rounds; p10 and p90 of the slope; and
        ``bend``, the largest distance of a median from the line through the medians, as a share of
        their range: 0 where cost is linear.
    """
    lines = [line(xs, ys) for ys in zip(*rounds, strict=True)]
    slopes = [slope for slope, _ in lines]
    medians = [statistics.median(times) for times in rounds]
    slope, intercept = line(xs, medians)
    off = max(abs(y - (slope * x + intercept)) for x, y in zip(xs, medians, strict=True))
    return {
        "slope_ms": statistics.median(slopes),
        "slope_p10_ms": quantile(slopes, 0.1),
        "slope_p90_ms": quantile(slopes, 0.9),
        "intercept_ms": statistics.median(intercept for _, intercept in lines),
        "bend": off / ((max(medians) - min(medians)) or 1.0),
    }

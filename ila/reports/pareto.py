"""Draw importance against cost: the best set of every budget, and plain top-k beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ila.price.budget import MEMORY, TIME, Spending
from ila.price.knapsack import Point
from ila.reports.figures import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9822b", "#5f6b76"
_AXIS = {
    TIME: "Time of a training step (1 = all layers open)",
    MEMORY: "Memory held when backward begins, GiB",
}


def pareto(
    spending: Spending, point: Point, plain: Point | None, path: str | os.PathLike[str]
) -> Path:
    """Save ``pareto_figure`` of a selection as a PNG, whole or not at all.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
    """
    resource, whole = spending.budget.resource, float(spending.frontier.values[-1])

    def place(p: Point) -> tuple[float, float]:
        return p.cost / spending.unit, p.importance / whole

    marks = [(*place(point), f"selected: {len(point.opened)} layers", _BLUE)]
    if plain is not None:
        marks.append((*place(plain), f"plain top-{len(plain.opened)}", _ORANGE))
    limit = (spending.budget.amount, "budget")
    return save_png(pareto_figure(spending.curves(), resource, marks, limit=limit), path)


def pareto_figure(
    curves: Mapping[str, Sequence[Sequence[float]]],
    resource: str,
    marks: Sequence[tuple[float, float, str, str]] = (),
    *,
    limit: tuple[float, str] | None = None,
) -> Figure:
    """Draw the curves of ``Spending.curves``.

    Args:
        curves: Points (cost, share of the importance) of the frontier and of plain top-k.
        resource: ``"time"``, ``"memory"`` or ``"parameters"``: unit of the costs.
        marks: Sets to point out: cost, share, label, colour.
        limit: A budget to draw as a vertical line, and its label.

    Returns:
        A figure outside matplotlib's global state.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    scale = {MEMORY: 2**30, TIME: 1}.get(resource, 1e6)
    figure = Figure(figsize=(8.4, 5.4))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    lines = [
        ("frontier", "the best choice at each cost", _BLUE, "-", 2.4),
        ("plain", "plain top-k: the k layers with the highest scores", _ORANGE, "--", 1.8),
    ]
    for name, label, colour, style, width in lines:
        x = [cost / scale for cost, _ in curves[name]]
        axes.plot(x, [y for _, y in curves[name]], style, color=colour, lw=width, label=label)
    if limit is not None and limit[0] <= max(cost for cost, _ in curves["plain"]):
        _draw_limit(axes, limit[0] / scale, limit[1])
    _mark(axes, marks, scale)
    axes.set_xlabel(_AXIS.get(resource, "Trainable parameters, millions"))
    axes.set_ylabel("Importance kept (all layers = 100 %)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.16)  # room for the legend
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    axes.set_title("What training a part of the layers costs, and how much of the gain it keeps")
    return figure


def _draw_limit(axes: Axes, x: float, label: str) -> None:
    axes.axvline(x, color=_GREY, lw=1.2, ls=":")
    axes.annotate(label, (x, 0.015), (-5, 0), textcoords="offset points", ha="right", color=_GREY)


def _mark(axes: Axes, marks: Sequence[tuple[float, float, str, str]], scale: float) -> None:
    """Draw points with labels: above on the left; for a plain top-k below on the right.

    The frontier runs at the left of plain top-k; its right side is free up to the edge.
    """
    left, right = axes.get_xlim()
    for cost, share, label, colour in marks:
        x = cost / scale
        axes.plot([x], [share], "o", color=colour, ms=9, zorder=5)
        beside = colour != _BLUE and (x - left) / (right - left) < 0.7
        axes.annotate(
            f"{label}, {share:.0%}",
            (x, share),
            (9, -5) if beside else (-9, 5),
            textcoords="offset points",
            color=colour,
            weight="bold",
            ha="left" if beside else "right",
            va="top" if beside else "bottom",
        )

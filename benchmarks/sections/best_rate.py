"""Ways to choose few layers, each trained from scratch at its own best learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.frontier.methods import LAST_MLPS, SHARES, by_share
from benchmarks.frontier.ways import FULL, NO_QK, Way
from benchmarks.sections.common import table
from benchmarks.sections.frontier import frontier
from benchmarks.sections.frontier_numbers import Point, gap
from benchmarks.sections.study_numbers import Estimate

PAGE = "study"
TITLE = "Choosing few layers: best rate against best rate"
ORDER = 2


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of the page."""
    found = frontier(results)
    points = {} if found is None else {p.way.name: p for p in found.points("one pass")}
    tables = by_shares(points, LAST_MLPS)
    return [_RULE, *tables] if tables else []


def by_shares(points: Mapping[str, Point], mlps: Way) -> list[str]:
    """Return a table for each share of the layers that ways were trained at."""
    return [part for share in SHARES for part in _share(points, share, mlps)]


_RULE = (
    "The trainings of the one pass above, from scratch on the layers that a method chooses. "
    "`path`, `gate_gradient`, `update_norm` and `ila` search: they score after a whole run on all "
    "layers of the same data. The others are controls that need none on that data: the MLPs of the "
    "last 21 blocks (as many layers as 30 %), the singular values of the base weights (`snr`, "
    "`kappa`), the mean `path` scores of the other data sets (`others`), the same as far as kind "
    "and block explain their places (`additive`), and random layers. Without q and k 71 % are "
    "left. A row with fewer runs saw fewer data sets or seeds. *Against `path`* compares on the "
    "same data sets and seeds. A rate with a star is the lowest or the highest that was tried."
)


def _share(points: Mapping[str, Point], share: float, mlps: Way) -> list[str]:
    """Return the table of one share; nothing where no way was trained.

    Without q and k 5 of 7 layers are left, so that row is in the table of 75 %.
    """
    beside = {0.3: [mlps], 0.75: [NO_QK]}.get(share, [])
    ways = [FULL, *beside, *by_share(share)]
    rows = [points[way.name] for way in ways if way.name in points]
    if len(rows) < 2:
        return []
    best = next((p for p in rows if p.way.scored_by == "path"), None)
    header = ["layers", "gain lost", "against `path`", "best rate, 10⁻³", "runs"]
    lines = [
        [
            _name(point.way, share),
            _percent(point.estimate()),
            _against(point, best),
            ", ".join(f"{r * 1e3:g}{'*' * (d in point.at_edge)}" for d, r in point.rates.items()),
            str(point.estimate().count),
        ]
        for point in rows
    ]
    return [f"**{share:.0%} of the layers.**", table(header, lines)]


def _name(way: Way, share: float) -> str:
    return way.name if way.scored_by is None else f"best {share * 100:g} % by `{way.scored_by}`"


def _against(point: Point, best: Point | None) -> str:
    """Return how much more of the gain a way loses than ``path``, where both were trained."""
    if best in (None, point) or point.way == FULL or not point.lost.keys() & best.lost.keys():
        return ""
    return _percent(gap(point, best))


def _percent(said: Estimate) -> str:
    if said.count < 2:
        return f"{said.mean * 100:+.1f} %"
    return f"{said.mean * 100:+.1f} % ({said.low * 100:+.1f} … {said.high * 100:+.1f})"

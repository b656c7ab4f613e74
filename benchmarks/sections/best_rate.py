"""Ways to choose few layers, each trained from scratch at its own best learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from benchmarks.frontier.methods import LAST_MLPS, NAMED, OTHER_ROWS, SHARES, by_share
from benchmarks.frontier.other_rows import SEEDS_APART, name_of
from benchmarks.frontier.ways import FULL, NO_QK, Way
from benchmarks.sections.common import table
from benchmarks.sections.frontier import each, frontier, percent, signed
from benchmarks.sections.frontier_numbers import Cell, Frontier, Point, gap
from benchmarks.sections.study_numbers import Estimate
from benchmarks.sections.verdict import words
from ila.masks.mask import LayerMask, chance_jaccard

PAGE = "study"
TITLE = "Choosing few layers: best rate against best rate"
ORDER = 2


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of the page."""
    found = frontier(results)
    points = {} if found is None else {p.way.name: p for p in found.points("one pass")}
    tables = by_shares(points, LAST_MLPS, OTHER_ROWS, *NAMED)
    if not tables:
        return []
    named = _NAMED if any(way.name in points for way in NAMED) else ""
    said = [_RULE, named, *_apart(found), worst(found)]
    return [*(text for text in said if text), *tables]


def by_shares(points: Mapping[str, Point], *at_30: Way) -> list[str]:
    """Return a table for each share of the layers that ways were trained at.

    Args:
        points: Name -> way.
        *at_30: Further ways that train as many layers as 30 %.
    """
    return [part for share in SHARES for part in _share(points, share, at_30)]


def _apart(found: Frontier) -> list[str]:
    """Say how far masks agree with those of a search that shares no row with the training."""
    masks = {
        cell: LayerMask({str(place): score for place, score in enumerate(scores)})
        for cell, scores in found.scores("path").items()
    }
    apart = [(cell, (name_of(cell[0]), cell[1] + SEEDS_APART)) for cell in masks]
    apart = [pair for pair in apart if pair[1] in masks]
    seeds = [(one, two) for (one, _), (two, _) in combinations(apart, 2) if one[0] == two[0]]
    if not seeds:
        return []
    said, ceiling = (_agreement(masks, pairs) for pairs in (apart, seeds))
    return [
        "A search reads the rows of the training that follows, in its order and from the same "
        "adapter. `other-rows` are the scores of a search on as many "
        f"further rows of the set, by another seed. Both rank the layers with {said}; two seeds of "
        f"one set with {ceiling}. By chance the overlap is {chance_jaccard(0.3):.2f}."
    ]


def worst(found: Frontier) -> str:
    """Count how many of the layers with the lowest scores are q or k."""
    listed = [result["names"] for _, result in found.lines["layers"]]
    trained = {(key["data"], key["seed"]) for key, _ in found.lines["frontier"]}
    searched = [scores for cell, scores in found.scores("path").items() if cell in trained]
    if not listed or not searched:
        return ""
    names = listed[0]
    few = {name for name in names if name.endswith(("q_proj", "k_proj"))}
    counts = []
    for scores in searched:
        ranked = sorted(zip(scores, names, strict=True))
        counts.append(len(few & {name for _, name in ranked[: len(few)]}))
    return (
        f"Of the {len(few)} layers with the lowest `path` scores, {fmean(counts):.1f} are q or k "
        f"({min(counts)} … {max(counts)} over {len(counts)} searches); random layers would have "
        f"{len(few) ** 2 / len(names):.1f}."
    )


def _agreement(masks: Mapping[Cell, LayerMask], pairs: Sequence[tuple[Cell, Cell]]) -> str:
    both = [(masks[one], masks[two]) for one, two in pairs]
    rho = fmean(one.spearman(two) for one, two in both)
    overlap = fmean(one.top(0.3).jaccard(two.top(0.3)) for one, two in both)
    return (
        f"ρ = {rho:.2f} and an overlap of the best 30 % of {overlap:.2f} (intersection over union, "
        f"{len(both)} pairs)"
    )


_RULE = (
    "The trainings of the one pass above, from scratch on the layers that a method chooses. "
    "`path`, `gate_gradient`, `update_norm` and `ila` search: they score after a whole run on all "
    "layers of the same data. Controls do not read that data: the MLPs of the last 21 blocks (as "
    "many layers as 30 %), the singular values of the base weights (`snr`, `kappa`), the mean "
    "`path` scores of the other data sets (`others`), the same predicted from kind and block "
    "(`additive`), and random layers. No q and k leaves 71 % of the "
    "layers, so it stands in the table of 75 %. *Against `path`* compares on the same data sets "
    "and seeds, with a word as above, each table a list. A rate with a star is the lowest or the "
    "highest that was tried. Compare only rows with the same number of runs."
)
_NAMED = (
    "`output_norm` (LoRA-drop) reads 120 rows after such a run, `feature_norm` (PLoP) and "
    "`gradient_norm` read them before any."
)


def _share(points: Mapping[str, Point], share: float, at_30: Sequence[Way]) -> list[str]:
    """Return the table of one share; nothing where no way was trained.

    Without q and k 5 of 7 layers are left, so that row is in the table of 75 %.
    """
    beside = {0.3: at_30, 0.75: [NO_QK]}.get(share, [])
    ways = [FULL, *beside, *by_share(share)]
    rows = [points[way.name] for way in ways if way.name in points]
    if len(rows) < 2:
        return []
    against = _against(rows)
    header = ["layers", "gain lost", "by data set, %", "against `path`", "best rate, 10⁻³", "runs"]
    lines = [
        [
            _name(point.way, share),
            percent(point.estimate()),
            each(point),
            against.get(point.way.name, ""),
            ", ".join(f"{r * 1e3:g}{'*' * (d in point.at_edge)}" for d, r in point.rates.items()),
            str(len(point.lost)),
        ]
        for point in rows
    ]
    return [f"**{share:.0%} of the layers.**", table(header, lines)]


def _name(way: Way, share: float) -> str:
    return way.name if way.scored_by is None else f"best {share * 100:g} % by `{way.scored_by}`"


def _against(rows: Sequence[Point]) -> dict[str, str]:
    """Return name -> how much more of the gain a way loses than ``path``, where both trained.

    A word stands behind it only where data sets are the replicates: pairs are not independent.
    """
    best = next((point for point in rows if point.way.scored_by == "path"), None)
    if best is None:
        return {}
    others = [
        point
        for point in rows
        if point is not best and point.way != FULL and point.lost.keys() & best.lost.keys()
    ]
    behind = [gap(point, best) for point in others]
    told = [""] * len(others) if best.by_pairs else [f", {word}" for word in words(behind)]
    return {
        point.way.name: _difference(said) + word
        for point, said, word in zip(others, behind, told, strict=True)
    }


def _difference(said: Estimate) -> str:
    """Return a difference in percent with its sign and its interval."""
    mean, low, high = map(signed, (said.mean, said.low, said.high))
    return f"{mean} %" if said.count < 2 else f"{mean} % ({low} … {high})"

"""Do the scores mean something? Importance kept by a mask against the gain that training it loses.

Of every training of the study, whatever method chose its layers: the share of the `path` scores of
the same data and seed that its open layers hold, as a plain sum and as a sum over blocks of roots,

    kept = Σ_open s / Σ s            kept = Σ_blocks (Σ_open-in-block s)^0.6 / Σ_blocks (Σ s)^0.6
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frontier.methods import LAST_MLPS, NAMED, by_share
from benchmarks.sections.common import COLOURS, INK, picture, save
from benchmarks.sections.frontier import frontier
from benchmarks.sections.frontier_numbers import Frontier
from benchmarks.sections.pieces import untitled
from benchmarks.sections.study_lessons import METHOD, SHARE, largest
from benchmarks.sections.study_numbers import ALL, Study
from benchmarks.study.agreement import spearman
from benchmarks.study.cells import within
from ila.masks.mask import LayerMask
from ila.masks.names import parse_module_name

PAGE = "study"
TITLE = "Do the scores mean something?"
ORDER = 2
FIGURE = "importance.png"
POWER = 0.6
ALIKE = (LAST_MLPS, *by_share(SHARE), *NAMED)


class Trained(NamedTuple):
    """One training.

    Attributes:
        method: Of its mask.
        plain, concave: Importance kept, in both forms.
        lost: Share of the gain.
        opened: Number of open layers.
        alike: Whether it opens the best 30 % by count, as others do.
    """

    method: str
    plain: float
    concave: float
    lost: float
    opened: int
    alike: bool


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of the page."""
    study = largest(results)
    rows = [] if study is None else trainings(study)
    if len(rows) < 3:
        return []
    methods = {row.method for row in rows}
    alike = [row for row in rows if row.alike]
    paragraphs = [
        f"The {len(rows)} trainings of {study.name} at one learning rate (below), on masks of "
        f"{len(methods)} methods. Importance is what the `path` scores of the same data set and "
        "seed sum up to over the open layers. It orders the losses with Spearman's ρ = "
        f"{rho_of(rows, 'plain'):.2f}; summed as Σ over blocks of (importance kept in the "
        f"block)^{POWER}, with {rho_of(rows, 'concave'):.2f} (the exponent was chosen on these "
        f"trainings). Much of that is size: the number of open layers alone gives "
        f"{rho_of(rows, 'opened'):.2f}. Among the {len(alike)} trainings with 30 % of the layers "
        f"ρ is {rho_of(alike, 'plain'):.2f} and {rho_of(alike, 'concave'):.2f}."
    ]
    return [
        *paragraphs,
        *_at_best_rates(frontier(results)),
        picture(FIGURE, "Share of the gain lost against importance kept"),
    ]


def rho_of(rows: Sequence[Trained], field: str) -> float:
    """Return how well a field orders the losses: Spearman's ρ of both, positive where it does."""
    return -_rho([getattr(row, field) for row in rows], [row.lost for row in rows])


def _at_best_rates(found: Frontier | None) -> list[str]:
    """Say the same of the trainings at best rates, and what each way keeps and loses."""
    rows = [] if found is None else at_best_rates(found)
    methods = list(dict.fromkeys(row.method for row in rows))
    if len(methods) < 3:
        return []
    each = []
    for method in methods:
        mine = [row for row in rows if row.method == method]
        kept_, lost = (fmean(getattr(row, field) for row in mine) for field in ("plain", "lost"))
        each.append((lost, f"{method} {kept_:.2f} and {lost * 100:.1f} %"))
    return [
        f"At best rates ρ is {rho_of(rows, 'plain'):.2f} and {rho_of(rows, 'concave'):.2f}, over "
        f"{len(rows)} trainings with 30 % of the layers whose scores are recorded, all data sets "
        "and seeds pooled. Kept and lost, "
        f"means: {'; '.join(text for _, text in sorted(each))}."
    ]


def at_best_rates(found: Frontier) -> list[Trained]:
    """Return the trainings with 30 % of the layers whose scores are recorded, at best rates."""
    layers = [result["names"] for _, result in found.lines["layers"]]
    searched, rows = found.scores(METHOD), []
    for point in found.points("one pass") if layers else []:
        by = point.way.scored_by
        if point.way not in ALIKE:
            continue
        scored = found.scores(by) if by is not None else {}
        for cell, lost in point.lost.items():
            weights, chosen = searched.get(cell), scored.get(cell)
            if weights is None or (by is not None and chosen is None):
                continue
            opened = set(point.way.mask(layers[0], chosen).open)
            scores = dict(zip(layers[0], np.maximum(weights, 0.0), strict=True))
            both = kept(scores, opened), kept(scores, opened, POWER)
            name = point.way.name if by is None else f"`{by}`"
            rows.append(Trained(name, *both, lost, len(opened), True))
    return rows


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Return the scatter of all trainings, in both forms."""
    study = largest(results)
    rows = [] if study is None else trainings(study)
    return {FIGURE: partial(_draw, rows)} if len(rows) >= 3 else {}


def trainings(study: Study) -> list[Trained]:
    """Return every training on a mask that has the scores of its own data and seed."""
    rows = []
    for (data, seed, method, cut, share), result in study.trained.items():
        whole = study.trained.get((data, seed, ALL, "", 1.0))
        weights = study.masks.get((data, seed, METHOD))
        chosen = study.masks.get((data, seed, method))
        if not cut or None in (whole, weights, chosen):
            continue
        opened = _opened(study, chosen["scores"], cut, share)
        scores = dict(zip(study.layers, np.maximum(weights["scores"], 0.0), strict=True))
        gain = study.losses[data, seed] - whole["held_out_loss"]
        lost = (result["held_out_loss"] - whole["held_out_loss"]) / gain
        both = kept(scores, opened), kept(scores, opened, POWER)
        alike = (cut, share) == ("count", SHARE)
        rows.append(Trained(method, *both, lost, len(opened), alike))
    return rows


def _opened(study: Study, scores: Sequence[float], cut: str, share: float) -> set[str]:
    mask = LayerMask(dict(zip(study.layers, scores, strict=True)))
    if cut == "count":
        return set(mask.top(share).open)
    sizes = dict(zip(study.layers, study.sizes, strict=True))
    return {name for name, opened in within(mask, sizes, share).items() if opened}


def kept(scores: Mapping[str, float], opened: set[str], power: float | None = None) -> float:
    """Return the share of the importance that open layers hold.

    Args:
        scores: Layer -> importance, ≥ 0.
        opened: Names of the open layers.
        power: Exponent for the sum of each block; None sums over layers.

    >>> scores = {"layers.0.q_proj": 3.0, "layers.0.v_proj": 1.0, "layers.1.q_proj": 4.0}
    >>> kept(scores, {"layers.0.q_proj", "layers.0.v_proj"})
    0.5
    >>> round(kept(scores, {"layers.0.v_proj", "layers.1.q_proj"}, power=0.5), 2)
    0.75
    """
    whole, inside = defaultdict(float), defaultdict(float)
    for name, value in scores.items():
        block = parse_module_name(name)[0] if power is not None else None
        whole[block] += value
        inside[block] += value if name in opened else 0.0
    exponent = 1.0 if power is None else power
    return sum(v**exponent for v in inside.values()) / sum(v**exponent for v in whole.values())


def _rho(a: Sequence[float], b: Sequence[float]) -> float:
    return float(spearman(np.asarray(a)[None], np.asarray(b)[None])[0])


def _draw(rows: Sequence[Trained], path: Path) -> None:
    figure, axes = untitled(1, 2, size=(9.5, 4.0))
    methods = list(dict.fromkeys(row.method for row in rows))
    labels = ("importance kept", f"importance kept, blocks to the power {POWER}")
    for axis, label, field in zip(axes[0], labels, ("plain", "concave"), strict=True):
        for number, method in enumerate(methods):
            mine = [row for row in rows if row.method == method]
            axis.plot(
                [getattr(row, field) for row in mine],
                [row.lost * 100 for row in mine],
                "o" if number < len(COLOURS) else "^",
                color=COLOURS[number % len(COLOURS)],
                markersize=4,
                alpha=0.75,
                label=method,
            )
        axis.set_title(
            f"Spearman's ρ = {rho_of(rows, field):.2f}", loc="left", fontsize=11, color=INK
        )
        axis.set_xlabel(label, color=INK)
    axes[0, 0].set_ylabel("share of the gain lost, %", color=INK)
    axes[0, 1].legend(fontsize=8, frameon=False)
    save(figure, path)

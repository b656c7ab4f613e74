"""Figures of the study: heat maps, agreement, loss against the share of layers open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sections.common import BLUE, FAINT, INK, ORANGE, new_figure, save
from benchmarks.sections.study_numbers import Estimate, Study
from benchmarks.study.agreement import spearman
from ila.masks.names import parse_module_name

SHOWN = ("path", "ila")


def _mean_scores(study: Study, data: str, method: str) -> np.ndarray | None:
    rankings = [r["scores"] for (d, _, m), r in study.masks.items() if (d, m) == (data, method)]
    if not rankings:
        return None
    # Ranks: methods and data sets have units of their own.
    ranks = [np.argsort(np.argsort(scores)) / (len(scores) - 1) for scores in rankings]
    return np.mean(ranks, axis=0)


def heat(study: Study, path: Path) -> None:
    """Mean rank of every layer: blocks down, kinds of modules across, data sets side by side."""
    places = [parse_module_name(name) for name in study.layers]
    kinds = list(dict.fromkeys(kind for _, kind in places))
    blocks = max(block for block, _ in places) + 1
    methods = [m for m in SHOWN if m in study.methods]
    figure, axes = new_figure(
        f"Which layers matter, by data set: {study.name}",
        f"rank of the score, from 0 (least important) to 1, mean over {len(study.seeds)} seeds",
        width=max(6.5, 1.2 + 2.3 * len(study.data)),
        height=1.6 + len(methods) * (1.1 + 0.11 * blocks),
        nrows=len(methods),
        ncols=len(study.data),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    image = None
    for row, method in zip(axes, methods, strict=True):
        for one, data in zip(row, study.data, strict=True):
            one.set_title(f"{data}: {method}", fontsize=10, color=INK, loc="left")
            one.grid(False)
            values = _mean_scores(study, data, method)
            if values is None:
                continue
            grid = np.full((blocks, len(kinds)), np.nan)
            for (block, kind), value in zip(places, values, strict=True):
                grid[block, kinds.index(kind)] = value
            image = one.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
            one.set_xticks(range(len(kinds)), [k.removesuffix("_proj") for k in kinds], rotation=60)
        row[0].set_ylabel("block")
    figure.colorbar(image, ax=axes, label="rank of the layer", shrink=0.6)
    save(figure, path)


def agreement(study: Study, path: Path) -> None:
    """Spearman's ρ between data sets and seeds, of each method; and between methods."""
    methods = [m for m in SHOWN if m in study.methods]
    figure, axes = new_figure(
        f"How far rankings agree: {study.name}",
        "Spearman's rank correlation; 1 is the same order, 0 is chance",
        width=5.2 * (len(methods) + 1),
        height=5.6,
        ncols=len(methods) + 1,
        squeeze=False,
    )
    for one, method in zip(axes[0], methods, strict=False):
        keys = sorted(
            ((d, s) for d, s, m in study.masks if m == method),
            key=lambda key: (study.data.index(key[0]), key[1]),
        )
        scores = np.array([study.masks[(*key, method)]["scores"] for key in keys])
        names = [f"{data} {seed}" for data, seed in keys]
        _matrix(one, spearman(scores[:, None], scores[None]), names)
        one.set_title(f"{method}: data set and seed", fontsize=10, color=INK, loc="left")
    _matrix(axes[0][-1], _between_methods(study), study.methods)
    axes[0][-1].set_title("methods, same data set and seed", fontsize=10, color=INK, loc="left")
    save(figure, path)


def _between_methods(study: Study) -> np.ndarray:
    count = len(study.methods)
    matrix = np.full((count, count), np.nan)
    for i, a in enumerate(study.methods):
        for j, b in enumerate(study.methods):
            shared = [(d, s) for d, s, m in study.masks if m == a and (d, s, b) in study.masks]
            pairs = [[study.masks[(*key, m)]["scores"] for m in (a, b)] for key in shared]
            if pairs:
                matrix[i, j] = np.mean([spearman(np.array(x), np.array(y)) for x, y in pairs])
    return matrix


def _matrix(axes: Any, values: np.ndarray, names: list[str]) -> None:
    axes.grid(False)
    axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.7 else INK
            size = 8 if len(names) < 8 else 6
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=size, color=colour)


def loss(study: Study, path: Path) -> None:
    """How far each selection stays behind all layers: a panel for each share, methods down."""
    cuts = list(dict.fromkeys(cut for cut, _ in study.cuts()))
    shares = sorted({share for _, share in study.cuts()})
    methods = list(dict.fromkeys(m for _, _, m, c, _ in study.trained if c))
    methods.sort(
        key=lambda m: -np.mean([x for at in study.cuts() for x in study.losing(m, *at).values()])
    )
    figure, axes = new_figure(
        f"What training only the best layers loses: {study.name}",
        f"held-out loss minus that of all layers, {study.steps} steps from scratch; mean over n "
        "data sets and seeds,\nwith 95 % intervals; methods with another n saw other data",
        width=max(7.5, 2.0 + 3.2 * len(shares)),
        height=1.3 + len(cuts) * (0.8 + 0.27 * len(methods)),
        nrows=len(cuts),
        ncols=len(shares),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for row, cut in zip(axes, cuts, strict=True):
        for one, share in zip(row, shares, strict=True):
            by = "of the layers" if cut == "count" else "of the parameters"
            one.set_title(f"{share:.0%} {by}", fontsize=10, color=INK, loc="left")
            one.axvline(0, color=FAINT, lw=1)
            for place, method in enumerate(methods):
                values = study.by_data(study.losing(method, cut, share))
                if values:
                    said = Estimate.of(values)
                    error = None if said.count == 1 else said.high - said.mean
                    colour = ORANGE if method in SHOWN else BLUE
                    one.errorbar(said.mean, place, xerr=error, fmt="o", color=colour, capsize=3)
                    at = (said.mean, place)
                    shown = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
                    one.annotate(f"n = {said.count}", at, (0, 5), color=colour, **shown)
    axes[0][0].set_yticks(range(len(methods)), methods)
    for one in axes[-1]:
        one.set_xlabel("nats per answer token behind all layers")
    save(figure, path)

"""How far two rankings of the same layers agree, and how sure that is; numpy only.

Spearman's ρ of scores that are means over batches is uncertain because other batches would have
given other means: the scores of disjoint parts of the batches are drawn again with replacement, for
both rankings, and ρ ± 1.96 standard deviations of what that gives is its interval: where ρ would
lie for as many other batches. Percentiles would not do: what is drawn again holds the noise twice,
and its ρ is lower throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ila.masks.mask import LayerMask

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
DRAWS = 400
# What a mask depends on; two masks are compared if they differ in one of these alone.
FACTORS = ("data", "seed", "method", "milestone", "score_init", "score_lr", "stage2_steps")


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ρ along the last axis; ranks of ties are their mean, NaN where all are equal."""
    a, b = (_centred_ranks(values) for values in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    ranks = below + (equal - 1) / 2
    return ranks - ranks.mean(-1, keepdims=True)


def interval(a: Sequence, b: Sequence, draws: int = DRAWS) -> list[float] | None:
    """95 % of ρ over parts of the data, each ranking's drawn again.

    None with fewer than 3 parts, or where one of the two ranks nothing, all its scores being equal.

    Args:
        a: Scores by part, (parts, layers).
        b: The same of the other ranking; the number of parts may be another.
        draws: How often.
    """
    if min(len(a), len(b)) < 3:
        return None
    draw = np.random.default_rng(0)
    means = []
    for parts in (np.asarray(a, float), np.asarray(b, float)):
        chosen = draw.integers(len(parts), size=(draws, len(parts)))
        means.append(parts[chosen].mean(1))
    rho, drawn = spearman(np.mean(a, 0), np.mean(b, 0)), spearman(*means)
    if np.isnan(rho):
        return None
    # A part of stage 1 in which B was still 0 ranks nothing.
    half = 1.96 * np.std(drawn[np.isfinite(drawn)], ddof=1)
    return [round(float(np.clip(edge, -1, 1)), 4) for edge in (rho - half, rho + half)]


def halves(folds: Sequence) -> float | None:
    """Mean ρ between the halves of the data, over all ways to halve its parts; None if too few."""
    parts = np.asarray(folds, float)
    if len(parts) < 4:
        return None
    rhos = []
    for bits in range(1 << (len(parts) - 1)):
        first = np.array([bits >> i & 1 for i in range(len(parts))], bool)
        if first.sum() == len(parts) // 2:
            rhos.append(spearman(parts[first].mean(0), parts[~first].mean(0)))
    rhos = [rho for rho in rhos if np.isfinite(rho)]
    return round(float(np.mean(rhos)), 4) if rhos else None


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Jaccard of the best 10–90 %, ρ and its interval of two results with scores and folds."""
    names = [str(place) for place in range(len(a["scores"]))]
    masks = [LayerMask(dict(zip(names, one["scores"], strict=True))) for one in (a, b)]
    rho = float(spearman(np.array(a["scores"]), np.array(b["scores"])))
    return {
        "jaccard": {str(p): round(masks[0].top(p).jaccard(masks[1].top(p)), 4) for p in SHARES},
        "spearman": None if np.isnan(rho) else round(rho, 4),
        "interval": interval(a["folds"], b["folds"]),
    }


def pairs(masks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """(factor, place, place) of keys that differ in that factor and in nothing else.

    Methods have options that others lack; those are compared at the first values of the options.
    """
    first: dict[str, Any] = {}
    for key in masks:
        for name in FACTORS[3:]:
            first.setdefault(name, key.get(name))
            first[name] = key.get(name) if first[name] is None else first[name]
    usual = [all(key.get(n) in (None, v) for n, v in first.items()) for key in masks]
    for i, a in enumerate(masks):
        for j in range(i + 1, len(masks)):
            b = masks[j]
            differ = {n for n in {*a, *b} if a.get(n) != b.get(n)}
            if "method" in differ and usual[i] and usual[j]:
                differ = {n for n in differ if n in a and n in b}
            if len(differ) == 1 and differ <= set(FACTORS):
                yield differ.pop(), i, j

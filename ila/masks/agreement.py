"""Agreement between masks, for every pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from ila.masks.mask import LayerMask, chance_jaccard

FRACTIONS = (0.1, 0.3, 0.5, 0.75)


class TopAgreement(TypedDict):
    """Overlap of the best layers of two masks.

    Attributes:
        fraction: Share p of the layers that each mask keeps.
        kept: Layers that each keeps.
        jaccard: Layers in both selections / layers in either.
        chance: The value that two random selections reach.
    """

    fraction: float
    kept: int
    jaccard: float
    chance: float


class Agreement(TypedDict):
    """Comparison of two masks, JSON-able.

    Attributes:
        a: Label of the first mask.
        b: Label of the second.
        modules: Layers that both score.
        top: Overlap at each share.
        spearman: Rank correlation; None if all scores of a mask are equal, which ranks nothing.
    """

    a: str
    b: str
    modules: int
    top: list[TopAgreement]
    spearman: float | None


def compare_table(
    masks: Mapping[str, LayerMask], fractions: Sequence[float] = FRACTIONS
) -> list[Agreement]:
    """Compare every pair of masks: do they rank the layers alike, and choose the same ones?

    Args:
        masks: Label -> mask, two or more over the same modules.
        fractions: Shares p at which the best layers of both masks are compared.

    Returns:
        A row for each pair.

    Raises:
        ValueError: Fewer than two masks, different modules, or a fraction outside (0, 1].

    >>> masks = {"one": LayerMask({"a": 1, "b": 2}), "two": LayerMask({"a": 3, "b": 4})}
    >>> row, = compare_table(masks, fractions=[0.5])
    >>> row["spearman"], row["top"]
    (1.0, [{'fraction': 0.5, 'kept': 1, 'jaccard': 1.0, 'chance': 0.3333333333333333}])
    """
    if len(masks) < 2:
        raise ValueError(f"masks must hold at least two masks to compare, got {len(masks)}")
    rows: list[Agreement] = []
    for (a, one), (b, other) in itertools.combinations(masks.items(), 2):
        try:
            rho = one.spearman(other)
        except ValueError as error:
            raise ValueError(f"masks {a!r} and {b!r} cannot be compared: {error}") from None
        rows.append(
            {
                "a": a,
                "b": b,
                "modules": len(one),
                "top": [_top_agreement(one, other, p) for p in fractions],
                "spearman": None if math.isnan(rho) else rho,
            }
        )
    return rows


def _top_agreement(one: LayerMask, other: LayerMask, p: float) -> TopAgreement:
    mine, theirs = one.top(p), other.top(p)
    return {
        "fraction": float(p),
        "kept": len(mine.open),
        "jaccard": mine.jaccard(theirs),
        "chance": chance_jaccard(p),
    }

"""Agreement between masks, for every pair."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ila.masks.mask import LayerMask, chance_jaccard

if TYPE_CHECKING:
    pass

FRACTIONS = (0.1, 0.3, 0.5, 0.75)


def compare_table(
    masks: Mapping[str, LayerMask], fractions: Sequence[float] = FRACTIONS
) -> list[dict[str, Any]]:
    """Compare every pair of masks: do they rank the layers alike, and choose the same ones?

    Args:
        masks: Label -> mask, two or more over the same modules.
        fractions: Shares p at which the best layers of both masks are compared.

    Returns:
        A row for each pair, JSON-able: ``a``, ``b``, ``modules``, ``spearman`` (None if all
        scores of a mask are equal, which ranks nothing), and ``top``, a list of ``fraction``,
        ``kept``, ``jaccard``, ``chance``.

    Raises:
        ValueError: Fewer than two masks, different modules, or a fraction outside (0, 1].

    >>> masks = {"one": LayerMask({"a": 1, "b": 2}), "two": LayerMask({"a": 3, "b": 4})}
    >>> row, = compare_table(masks, fractions=[0.5])
    >>> row["spearman"], row["top"]
    (1.0, [{'fraction': 0.5, 'kept': 1, 'jaccard': 1.0, 'chance': 0.3333333333333333}])
    """
    if len(masks) < 2:
        raise ValueError(f"masks must hold at least two masks to compare, got {len(masks)}")
    rows = []
    for (a, one), (b, other) in itertools.combinations(masks.items(), 2):
        try:
            rho = one.spearman(other)
        except ValueError as error:
            raise ValueError(f"masks {a!r} and {b!r} cannot be compared: {error}") from None
        row: dict[str, Any] = {"a": a, "b": b, "modules": len(one), "top": []}
        row["spearman"] = None if math.isnan(rho) else rho
        for p in fractions:
            mine, theirs = one.top(p), other.top(p)
            agreement = {"jaccard": mine.jaccard(theirs), "chance": chance_jaccard(p)}
            row["top"].append({"fraction": float(p), "kept": len(mine.open), **agreement})
        rows.append(row)
    return rows

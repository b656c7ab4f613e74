"""Predict the scores of layers from their kind and their block alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from ila.masks.names import parse_module_name


def by_kind_and_block(names: Sequence[str], scores: Sequence[float]) -> list[float]:
    """Return the least squares fit of kind + block to the places of the scores, 1 for the lowest.

    Every block has one layer of each kind. So the fit of a layer is the mean of its kind plus the
    mean of its block less the mean of all. Places keep one large score from deciding.

    Raises:
        ValueError: If a kind is missing in a block.

    >>> names = [f"layers.{block}.{kind}" for block in (0, 1) for kind in ("q_proj", "v_proj")]
    >>> by_kind_and_block(names, [0.1, 9.0, 0.3, 0.2])
    [2.0, 3.0, 2.0, 3.0]
    """
    places = {
        name: place for place, (_, name) in enumerate(sorted(zip(scores, names, strict=True)), 1)
    }
    of_block, of_kind = defaultdict(list), defaultdict(list)
    for name in names:
        block, kind = parse_module_name(name)
        of_block[block].append(places[name])
        of_kind[kind].append(places[name])
    if len(names) != len(of_block) * len(of_kind):
        raise ValueError(f"names must hold every kind in every block, got {len(names)} names")
    mean = fmean(places.values())
    return [
        fmean(of_kind[kind]) + fmean(of_block[block]) - mean
        for block, kind in map(parse_module_name, names)
    ]

"""The mask: a score for every linear layer, and which layers are open. No model and no torch.

The search makes a mask. ``top`` and ``without_bottom`` cut it, ``jaccard`` and ``spearman`` compare
two, and a small JSON file keeps one. *Layer* means one linear module: `q_proj`, `k_proj`, `v_proj`,
`o_proj`, `gate_proj`, `up_proj` or `down_proj` of a block. In a mixture of experts a tensor that
PEFT adapts, such as `mlp.experts.down_proj`, is a layer too.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np

from ila.masks.checks import (
    check_same_names,
    checked_gates,
    checked_scores,
    frozen,
    number,
    thawed,
    type_name,
)
from ila.masks.mask_file import file_of, read_fields, write_fields


@dataclass(frozen=True)
class LayerMask:
    """Importance of every linear layer and which of them are open; immutable.

    Args:
        scores: Module name -> importance, a finite number; larger is more important. Not empty.
        gates: Module name -> open?, for exactly the modules of ``scores``; at least one is open.
            None opens all, and reads back as a mapping.
        provenance: Where the scores come from (model, data, configuration, versions, seed). Any
            JSON value; the mask keeps a read-only copy in which lists are tuples.
            ``ila.masks.provenance.Provenance`` reads it by name.

    Raises:
        TypeError: An argument or one of its values has the wrong type.
        ValueError: No scores, a score that is not finite, gates for other modules, or all closed.

    >>> mask = LayerMask({"layers.0.q_proj": 0.9, "layers.0.k_proj": 0.2, "layers.1.q_proj": 0.5})
    >>> mask.top(0.34).open
    ('layers.0.q_proj',)
    >>> mask.without_bottom(0.3).closed
    ('layers.0.k_proj',)
    """

    scores: Mapping[str, float]
    gates: Mapping[str, bool] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scores = checked_scores(self.scores)
        gates = dict.fromkeys(scores, True) if self.gates is None else self.gates
        if not isinstance(self.provenance, Mapping):
            raise TypeError(f"provenance must be a mapping, got {type_name(self.provenance)}")
        object.__setattr__(self, "scores", MappingProxyType(scores))
        object.__setattr__(self, "gates", MappingProxyType(checked_gates(gates, scores)))
        object.__setattr__(self, "provenance", frozen(self.provenance, "provenance"))

    def __len__(self) -> int:
        return len(self.scores)

    def __hash__(self) -> int:
        return hash((frozenset(self.scores.items()), frozenset(self.open)))

    def with_provenance(self, **more: object) -> "LayerMask":
        """Return a mask with the same scores and gates, and more in its provenance.

        >>> LayerMask({"a": 1}, provenance={"seed": 0}).with_provenance(steps=3).provenance["steps"]
        3
        """
        return type(self)(self.scores, self.gates, {**thawed(self.provenance), **more})

    def __reduce__(self) -> tuple[object, ...]:
        # Mapping proxies can be neither pickled nor deep-copied.
        return type(self), (dict(self.scores), dict(self.gates), thawed(self.provenance))

    @property
    def open(self) -> tuple[str, ...]:
        """Name the open modules, in the order of ``scores``."""
        return tuple(name for name in self.scores if self.gates[name])

    @property
    def closed(self) -> tuple[str, ...]:
        """Name the closed modules, in the order of ``scores``."""
        return tuple(name for name in self.scores if not self.gates[name])

    @property
    def ranking(self) -> tuple[str, ...]:
        """Name all modules, the most important first; equal scores sort by name."""
        return tuple(sorted(self.scores, key=lambda name: (-self.scores[name], name)))

    def top(self, fraction: float) -> "LayerMask":
        """Open the best ``fraction`` of all modules, at least one, and close the others.

        Only the scores decide: a closed layer may open again. ``fraction * len(mask)`` is rounded
        half up, with ``fraction`` read as the decimal number that it prints as.

        Args:
            fraction: Share of the modules to keep, in (0, 1].

        Returns:
            A new mask with the same scores and provenance.

        Raises:
            TypeError: ``fraction`` is not a number.
            ValueError: ``fraction`` is not in (0, 1].

        >>> LayerMask({"a": 3, "b": 1, "c": 2, "d": 0}).top(0.5).open
        ('a', 'c')
        """
        if not 0 < number(fraction, "fraction") <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        return self._keep(max(1, _rounded_share(fraction, len(self))))

    def without_bottom(self, fraction: float) -> "LayerMask":
        """Close the worst ``fraction`` of all modules and open the others; otherwise as ``top``.

        Args:
            fraction: Share of the modules to close, in [0, 1).

        Returns:
            A new mask with the same scores and provenance.

        Raises:
            TypeError: ``fraction`` is not a number.
            ValueError: ``fraction`` is not in [0, 1), or rounds to all modules.

        >>> LayerMask({"a": 3, "b": 1, "c": 2, "d": 0}).without_bottom(0.25).closed
        ('d',)
        """
        if not 0 <= number(fraction, "fraction") < 1:
            raise ValueError(f"fraction must be in [0, 1), got {fraction}")
        kept = len(self) - _rounded_share(fraction, len(self))
        if kept == 0:
            raise ValueError(
                f"fraction must leave a module open, {fraction} closes all {len(self)}"
            )
        return self._keep(kept)

    def jaccard(self, other: "LayerMask") -> float:
        """Return |open in both| / |open in either|; compare it with ``chance_jaccard``.

        Args:
            other: Mask over the same modules.

        Returns:
            Agreement in [0, 1]; 1 means that the same modules are open.

        Raises:
            TypeError: ``other`` is not a mask.
            ValueError: ``other`` is about other modules.

        >>> mask = LayerMask({"a": 1, "b": 2, "c": 3, "d": 4})
        >>> mask.jaccard(mask.top(0.5))
        0.5
        """
        self._check_comparable(other)
        mine, theirs = set(self.open), set(other.open)
        return len(mine & theirs) / len(mine | theirs)

    def spearman(self, other: "LayerMask") -> float:
        """Return Spearman's rank correlation of the scores; equal scores share their mean rank.

        Args:
            other: Mask over the same modules.

        Returns:
            Correlation in [-1, 1]; NaN if all scores of either mask are equal, since such a mask
            ranks nothing.

        Raises:
            TypeError: ``other`` is not a mask.
            ValueError: ``other`` is about other modules.

        >>> LayerMask({"a": 1, "b": 2, "c": 3}).spearman(LayerMask({"a": 10, "b": 20, "c": 15}))
        0.5
        """
        self._check_comparable(other)
        mine = _centred_ranks([self.scores[name] for name in self.scores])
        theirs = _centred_ranks([other.scores[name] for name in self.scores])
        norm = math.sqrt((mine @ mine) * (theirs @ theirs))
        if norm == 0:
            return math.nan
        return min(1.0, max(-1.0, float(mine @ theirs) / norm))

    def spread(self) -> dict[str, float]:
        """Return minimum, maximum, mean and standard deviation of the scores, over all modules.

        Scores that hardly differ rank by noise: look at this before trusting a ranking.

        Returns:
            A dict with the keys ``min``, ``max``, ``mean`` and ``std`` (of the population).

        >>> LayerMask({"a": 1, "b": 3}).spread()
        {'min': 1.0, 'max': 3.0, 'mean': 2.0, 'std': 1.0}
        """
        return spread_of(self.scores)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as JSON; a failure leaves the old file.

        Args:
            path: File, or a folder, in which the file is called ``mask.json``.

        Raises:
            FileNotFoundError: The folder of ``path`` does not exist.
            OSError: The file could not be written.
        """
        write_fields(file_of(path), self.scores, self.gates, thawed(self.provenance))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerMask":
        """Read a mask that ``save`` wrote; scores come back bit for bit.

        Args:
            path: File, or a folder that holds ``mask.json``.

        Returns:
            The mask.

        Raises:
            ValueError: The file is missing, or is not a whole and valid mask of this version. The
                message names the file and the fault.
        """
        file = file_of(path)
        try:
            return cls(**read_fields(file))
        except FileNotFoundError:
            raise ValueError(f"{file}: no such mask file") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not JSON, or cut short: {error}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not a valid mask: {error}") from None

    def _keep(self, count: int) -> "LayerMask":
        kept = set(self.ranking[:count])
        gates = {name: name in kept for name in self.scores}
        return type(self)(self.scores, gates, self.provenance)

    def _check_comparable(self, other: "LayerMask") -> None:
        if not isinstance(other, LayerMask):
            raise TypeError(f"other must be a LayerMask, got {type_name(other)}")
        check_same_names(other.scores, self.scores, "other")


def spread_of(scores: Mapping[str, float]) -> dict[str, float]:
    """Return ``LayerMask.spread`` of scores that are in no mask yet."""
    values = np.array(list(scores.values()))
    low, high = float(values.min()), float(values.max())
    exponent = math.frexp(max(-low, high))[1]
    scaled = np.ldexp(values, -exponent)  # exact, and sums of scores near 1e308 stay finite
    mean = math.ldexp(float(scaled.mean()), exponent)
    std = 0.0 if low == high else math.ldexp(float(scaled.std()), exponent)
    return {"min": low, "max": high, "mean": min(high, max(low, mean)), "std": std}


def chance_jaccard(p: float) -> float:
    """Return the Jaccard index that two random choices of a share p reach: p / (2 - p).

    Args:
        p: Share of the modules that each choice keeps, in [0, 1].

    Returns:
        The chance level (its limit for many modules).

    Raises:
        TypeError: ``p`` is not a number.
        ValueError: ``p`` is not in [0, 1].

    >>> chance_jaccard(0.75)
    0.6
    """
    if not 0 <= number(p, "p") <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    return p / (2 - p)


def _rounded_share(fraction: float, count: int) -> int:
    # 0.145 * 100 is 14.499999999999998 in floating point; the caller meant 14.5. str: numpy prints
    # the decimal that the caller wrote, and float32's 0.3 is not float64's.
    return math.floor(Fraction(str(fraction)) * count + Fraction(1, 2))


def _centred_ranks(values: list[float]) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[inverse] - (len(values) + 1) / 2

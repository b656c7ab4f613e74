"""Which linear layers matter, and which of them are open: plain data, no model and no torch.

A mask is made by the search, cut with ``top`` or ``without_bottom``, compared with other masks, and
kept in a small JSON file. *Layer* means one linear module (q, k, v, o, gate, up, down of a block).
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from ila.runs.atomic import write_json_atomic

FORMAT = "ila.layer_mask"
VERSION = 1
BLOCK_NUMBER = re.compile("0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class LayerMask:
    """Importance of every linear layer and which of them are open; immutable.

    Args:
        scores: Module name -> importance, a finite number; larger is more important. Not empty.
        gates: Module name -> open?, for exactly the modules of ``scores``; at least one is open.
            None opens all, and reads back as a mapping.
        provenance: Where the scores come from (model, data, configuration, versions, seed).
            Anything JSON can hold; it is kept as a read-only copy in which lists are tuples.

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
        scores = _checked_scores(self.scores)
        gates = dict.fromkeys(scores, True) if self.gates is None else self.gates
        if not isinstance(self.provenance, Mapping):
            raise TypeError(f"provenance must be a mapping, got {_type(self.provenance)}")
        object.__setattr__(self, "scores", MappingProxyType(scores))
        object.__setattr__(self, "gates", MappingProxyType(_checked_gates(gates, scores)))
        object.__setattr__(self, "provenance", _frozen(self.provenance, "provenance"))

    def __len__(self) -> int:
        return len(self.scores)

    def __hash__(self) -> int:
        return hash((frozenset(self.scores.items()), frozenset(self.open)))

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # mapping proxies can be neither pickled nor deep-copied
        return type(self), (dict(self.scores), dict(self.gates), thawed(self.provenance))

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the open modules, in the order of ``scores``."""
        return tuple(name for name in self.scores if self.gates[name])

    @property
    def closed(self) -> tuple[str, ...]:
        """Names of the closed modules, in the order of ``scores``."""
        return tuple(name for name in self.scores if not self.gates[name])

    @property
    def ranking(self) -> tuple[str, ...]:
        """All names, most important first; equal scores in the order of their names."""
        return tuple(sorted(self.scores, key=lambda name: (-self.scores[name], name)))

    def top(self, fraction: float) -> "LayerMask":
        """Open the best ``fraction`` of all modules, at least one, and close the others.

        Only the scores decide: what was closed before may be opened. ``fraction * len(mask)`` is
        rounded half up, with ``fraction`` read as the decimal number it prints as.

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
        if not 0 < _number(fraction, "fraction") <= 1:
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
        if not 0 <= _number(fraction, "fraction") < 1:
            raise ValueError(f"fraction must be in [0, 1), got {fraction}")
        kept = len(self) - _rounded_share(fraction, len(self))
        if kept == 0:
            raise ValueError(
                f"fraction must leave a module open, {fraction} closes all {len(self)}"
            )
        return self._keep(kept)

    def jaccard(self, other: "LayerMask") -> float:
        """|open in both| / |open in either|; compare it with ``chance_jaccard``.

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
            ranks nothing and agreement with it means nothing.

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
        values = np.array(list(self.scores.values()))
        low, high = float(values.min()), float(values.max())
        exponent = math.frexp(max(-low, high))[1]
        scaled = np.ldexp(values, -exponent)  # exact, and sums of scores near 1e308 stay finite
        mean = math.ldexp(float(scaled.mean()), exponent)
        std = 0.0 if low == high else math.ldexp(float(scaled.std()), exponent)
        return {"min": low, "max": high, "mean": min(high, max(low, mean)), "std": std}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as JSON; a failure leaves what was there before.

        Args:
            path: File, or a folder, in which the file is called ``mask.json``.

        Raises:
            FileNotFoundError: The folder of ``path`` does not exist.
            OSError: The file could not be written.
        """
        modules = {n: {"score": s, "open": self.gates[n]} for n, s in self.scores.items()}
        document = {"format": FORMAT, "version": VERSION, "modules": modules}
        write_json_atomic(_file_of(path), document | {"provenance": thawed(self.provenance)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerMask":
        """Read a mask that ``save`` wrote; scores come back bit for bit.

        Args:
            path: File, or a folder that holds ``mask.json``.

        Returns:
            The mask.

        Raises:
            ValueError: There is no such file, or it is no complete and valid mask of this version.
                The message names the file and what is wrong with it.
        """
        file = _file_of(path)
        try:
            document = json.loads(
                file.read_bytes().decode("utf-8"),
                object_pairs_hook=_without_duplicates,
                parse_constant=_refuse_constant,
            )
            return cls(**_fields_of(document))
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
            raise TypeError(f"other must be a LayerMask, got {_type(other)}")
        _check_same_names(other.scores, self.scores, "other")


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
    if not 0 <= _number(p, "p") <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    return p / (2 - p)


def parse_module_name(name: str) -> tuple[int, str] | None:
    """Split a module name into its block number and its kind.

    Args:
        name: A name from ``model.named_modules()``.

    Returns:
        The first of the dotted parts that is a number, and the last part; None if no number comes
        before the last part.

    >>> parse_module_name("base_model.model.model.layers.12.self_attn.q_proj")
    (12, 'q_proj')
    >>> parse_module_name("lm_head") is None
    True
    """
    *parents, kind = name.split(".")
    for part in parents:
        if BLOCK_NUMBER.fullmatch(part):
            return int(part), kind
    return None


def _checked_scores(scores: Any) -> dict[str, float]:
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a mapping from module name to number, got {_type(scores)}")
    if not scores:
        raise ValueError("scores must name at least one module, got none")
    checked = {}
    for name, score in scores.items():
        if not isinstance(name, str):
            raise TypeError(f"scores must have module names as keys, got {name!r}")
        checked[name] = _number(score, f"scores[{name!r}]")
        if not math.isfinite(checked[name]):
            raise ValueError(f"scores[{name!r}] must be finite, got {score}")
    return checked


def _checked_gates(gates: Any, scores: dict[str, float]) -> dict[str, bool]:
    if not isinstance(gates, Mapping):
        raise TypeError(f"gates must be a mapping from module name to bool, got {_type(gates)}")
    _check_same_names(gates, scores, "gates")
    for name, gate in gates.items():
        if not isinstance(gate, (bool, np.bool_)):
            raise TypeError(f"gates[{name!r}] must be True or False, got {gate!r}")
    if not any(gates.values()):
        raise ValueError(f"gates must leave a module open, all {len(scores)} are closed")
    return {name: bool(gates[name]) for name in scores}


def _check_same_names(given: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    if missing or unknown:
        found = [
            f"{len(names)} {word} (such as {names[0]!r})"
            for word, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(
            f"{what} must name the same {len(expected)} modules as scores, got {len(given)}: "
            + ", ".join(found)
        )


def _number(value: Any, what: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number, got {_type(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{what} must be finite, got an integer beyond every float") from None


def _rounded_share(fraction: float, count: int) -> int:
    # 0.145 * 100 is 14.499999999999998 in floating point; the caller meant 14.5. str: a number of
    # numpy's prints as what it was made from, and float32's 0.3 is not float64's.
    return math.floor(Fraction(str(fraction)) * count + Fraction(1, 2))


def _centred_ranks(values: list[float]) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[inverse] - (len(values) + 1) / 2


def _frozen(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} must have strings as keys, got {key!r}")
        return MappingProxyType({k: _frozen(v, f"{where}[{k!r}]") for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, f"{where}[{index}]") for index, item in enumerate(value))
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{where} must be something JSON can hold, got {_type(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    return value


def thawed(value: Any) -> Any:
    """Return plain dicts and lists of what ``provenance`` holds frozen."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


def _fields_of(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'expected an object with "format": "{FORMAT}"')
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"expected version {VERSION}, got {version!r}")
    _check_keys(document, {"format", "version", "modules", "provenance"}, "the file")
    if not isinstance(document["modules"], dict):
        raise ValueError(f"modules must be an object, got {_type(document['modules'])}")
    for name, entry in document["modules"].items():
        _check_keys(entry, {"score", "open"}, f"modules[{name!r}]")
    return {
        "scores": {name: entry["score"] for name, entry in document["modules"].items()},
        "gates": {name: entry["open"] for name, entry in document["modules"].items()},
        "provenance": document["provenance"],
    }


def _check_keys(entry: Any, expected: set[str], what: str) -> None:
    if not isinstance(entry, dict) or set(entry) != expected:
        got = sorted(entry) if isinstance(entry, dict) else _type(entry)
        raise ValueError(f"{what} must be an object with the fields {sorted(expected)}, got {got}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} appears twice in one object")
        found[key] = value
    return found


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is not a JSON number")


def _file_of(path: str | os.PathLike[str]) -> Path:
    return Path(path) / "mask.json" if Path(path).is_dir() else Path(path)


def _type(value: Any) -> str:
    return type(value).__name__

"""Check the parts of a mask; each error names the argument, the expectation and the value."""

import math
from collections.abc import Collection, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np


def checked_scores(scores: object) -> dict[str, float]:
    """Return the scores as floats, or raise."""
    if not isinstance(scores, Mapping):
        got = type_name(scores)
        raise TypeError(f"scores must be a mapping from module name to number, got {got}")
    if not scores:
        raise ValueError("scores must name at least one module, got none")
    checked = {}
    for name, score in scores.items():
        if not isinstance(name, str):
            raise TypeError(f"scores must have module names as keys, got {name!r}")
        checked[name] = number(score, f"scores[{name!r}]")
        if not math.isfinite(checked[name]):
            raise ValueError(f"scores[{name!r}] must be finite, got {score}")
    return checked


def checked_gates(gates: object, scores: dict[str, float]) -> dict[str, bool]:
    """Return the gates as bools in the order of the scores, or raise."""
    if not isinstance(gates, Mapping):
        raise TypeError(f"gates must be a mapping from module name to bool, got {type_name(gates)}")
    check_same_names(gates, scores, "gates")
    for name, gate in gates.items():
        if not isinstance(gate, (bool, np.bool_)):
            raise TypeError(f"gates[{name!r}] must be True or False, got {gate!r}")
    if not any(gates.values()):
        raise ValueError(f"gates must leave a module open, all {len(scores)} are closed")
    return {name: bool(gates[name]) for name in scores}


def check_same_names(given: Collection[str], expected: Collection[str], argument: str) -> None:
    """Raise unless both name the same modules."""
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    if missing or unknown:
        wrong = [
            f"{len(names)} {word} (such as {names[0]!r})"
            for word, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(
            f"{argument} must name the same {len(expected)} modules as scores, got {len(given)}: "
            + ", ".join(wrong)
        )


def number(value: object, argument: str) -> float:
    """Return a float, or raise an error that names the argument."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be a number, got {type_name(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{argument} must be finite, got an integer beyond every float") from None


def frozen(value: object, where: str) -> object:
    """Return a read-only copy of a JSON value, or raise."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} must have strings as keys, got {key!r}")
        return MappingProxyType({k: frozen(v, f"{where}[{k!r}]") for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(item, f"{where}[{index}]") for index, item in enumerate(value))
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{where} must be something JSON can hold, got {type_name(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    return value


def thawed(value: Any) -> Any:
    """Return plain dicts and lists from a value that ``frozen`` returned."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


def type_name(value: object) -> str:
    """Return the name of a value's type, for messages."""
    return type(value).__name__

"""Checks that several configurations share; each error names the field and its value."""

from __future__ import annotations

from collections.abc import Sequence


def check_counts(config: object, names: Sequence[str]) -> None:
    """Raise unless each of these fields is an integer of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}")


def check_positive(config: object, names: Sequence[str]) -> None:
    """Raise unless each of these fields is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value!r}")


def check_every(config: object, names: Sequence[str]) -> None:
    """Raise unless each of these numbers of steps is None or an integer of at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be None or an integer ≥ 1, got {value!r}")

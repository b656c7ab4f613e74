"""The measurements of a training run: ``metrics.json``, read and checked, and its words."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def load_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the measurements of a training run from ``metrics.json``.

    Args:
        path: Folder of the run.

    Returns:
        The content of the file. ``held_out_loss_before``, ``held_out_loss`` and
        ``peak_memory_bytes`` are None where they were not measured.

    Raises:
        ValueError: The file is missing, is not JSON, lacks keys, or holds values of the wrong type.
    """
    file = Path(path) / "metrics.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file; is this the folder of a training run?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON, or cut short: {error}") from None
    if not isinstance(run, dict):
        raise ValueError(f"{file}: must hold an object, got {type(run).__name__}")
    missing = [key for key in _RUN_KEYS if key not in run]
    if missing:
        raise ValueError(f"{file}: missing {', '.join(missing)}")
    for key, (expected, is_valid) in _RUN_KEYS.items():
        if not is_valid(run[key]):
            raise ValueError(f"{file}: {key} must be {expected}, got {run[key]!r:.80}")
    return run


def baseline_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the run that others are compared with: the first with the most layers open."""
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    return max(runs, key=lambda run: run["open_modules"])  # max returns the first of equals


def ratio_text(value: float | None, base: float | None) -> str:
    """Write ``(0.50x)``, or nothing where one of the two is not known."""
    return "" if value is None or not base else f" ({value / base:.2f}x)"


def loss_text(value: float | None) -> str:
    """Write a loss in nats with three decimals."""
    return "not measured" if value is None else f"{value:.3f}"


def ms_text(value: float) -> str:
    """Write milliseconds, with a decimal below a thousand."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def gib_text(value: int | None) -> str:
    """Write bytes in GiB with two decimals."""
    return "not measured" if value is None else f"{value / 2**30:.2f}"


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_times(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_number(value.get(k)) for k in ("median", "p10", "p90")
    )


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in value
    )


_TEXT = ("a text", lambda value: isinstance(value, str))
_COUNT = ("an integer of 0 or more", _is_count)
_NUMBER = ("a finite number", _is_number)
_LOSS = ("a finite number or null", lambda value: value is None or _is_number(value))
_RUN_KEYS: dict[str, tuple[str, Any]] = {
    "name": _TEXT,
    "open_modules": _COUNT,
    "total_modules": _COUNT,
    "fraction_open": _NUMBER,
    "trainable_parameters": _COUNT,
    "steps": _COUNT,
    "held_out_loss_before": _LOSS,
    "held_out_loss": _LOSS,
    "step_time_ms": ("an object with the numbers median, p10 and p90", _are_times),
    "peak_memory_bytes": ("an integer or null", lambda value: value is None or _is_count(value)),
    "tokens_per_step": _NUMBER,
    "losses": ("a list of [step, loss]", _are_losses),
    "device": _TEXT,
    "dtype": _TEXT,
}

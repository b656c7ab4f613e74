"""The measurements of a training run: the record in ``metrics.json``, read and checked."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict


class LayerCounts(TypedDict, total=False):
    """How much of a model is open.

    Attributes:
        open_modules: Layers that train.
        total_modules: Layers that could.
        fraction_open: The share of the two, in [0, 1].
        trainable_parameters: Parameters that require grad.
        full: True if the layers' own weights train; absent for adapters.
    """

    open_modules: int
    total_modules: int
    fraction_open: float
    trainable_parameters: int
    full: bool


class StepTime(TypedDict):
    """Wall time of an optimiser step in ms."""

    median: float
    p10: float
    p90: float


class Measured(TypedDict, total=False):
    """Cost of a training.

    Attributes:
        step_time_ms: Time of a step, forward to update.
        peak_memory_bytes: Peak memory of training; None where it is unknown.
    """

    step_time_ms: StepTime
    peak_memory_bytes: int | None


class Metrics(LayerCounts, Measured, total=False):
    """The content of ``metrics.json``.

    Attributes:
        name: Name of the run in reports.
        steps: Optimiser steps.
        held_out_loss_before: Nats per answer token before training; None if not measured.
        held_out_loss: The same after training.
        tokens_per_step: Over all devices, without padding.
        losses: [step, loss] of every step.
        prefix_cache: Size and cost of the prefix cache; None without one.
        device: Device, as torch writes it.
        dtype: Dtype of the base model, and its packing.
        config: The configuration of the training.
    """

    name: str
    steps: int
    held_out_loss_before: float | None
    held_out_loss: float | None
    tokens_per_step: float
    losses: list[list[float]]
    prefix_cache: dict[str, object] | None
    device: str
    dtype: str
    config: dict[str, object]


def load_run(path: str | os.PathLike[str]) -> Metrics:
    """Read the measurements of a training run from ``metrics.json``.

    Args:
        path: Folder of the run.

    Returns:
        The content of the file; a value that was not measured is None.

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


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_times(value: object) -> bool:
    return isinstance(value, dict) and all(
        _is_number(value.get(k)) for k in ("median", "p10", "p90")
    )


def _are_losses(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in value
    )


_TEXT = ("a text", lambda value: isinstance(value, str))
_COUNT = ("an integer of 0 or more", _is_count)
_NUMBER = ("a finite number", _is_number)
_LOSS = ("a finite number or null", lambda value: value is None or _is_number(value))
_RUN_KEYS: dict[str, tuple[str, Callable[[object], bool]]] = {
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

"""The measurements of a training run: the record in ``metrics.json``, read and checked."""

import os
from pathlib import Path
from typing import TypedDict

from ila.runs.records import COUNT, NUMBER, TEXT, Field, is_count, is_number, or_null, read_record


class LayerCounts(TypedDict, total=False):
    """How much of a model is open.

    Attributes:
        open_modules: Layers that train.
        kept_modules: Closed layers that keep their updates; absent if there is no such layer.
        total_modules: Layers that could.
        fraction_open: The share of the two, in [0, 1].
        trainable_parameters: Parameters that require grad.
        outside_parameters: Trained parameters outside all layers of a mask; absent without any.
        full: True if the layers' own weights train; absent for adapters.
    """

    open_modules: int
    kept_modules: int
    total_modules: int
    fraction_open: float
    trainable_parameters: int
    outside_parameters: int
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
        evaluations: [step, held-out loss] of every evaluation; absent without any.
        prefix_cache: Size and cost of the prefix cache; None without one.
        device: Device, as torch writes it.
        dtype: Dtype of the base model, and its packing.
        verdicts: Measurements by which ``impl="auto"`` chose, of ``ila tune``; may be empty.
        config: The configuration of the training.
    """

    name: str
    steps: int
    held_out_loss_before: float | None
    held_out_loss: float | None
    tokens_per_step: float
    losses: list[list[float]]
    evaluations: list[list[float]]
    prefix_cache: dict[str, object] | None
    device: str
    dtype: str
    verdicts: list[dict[str, object]]
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
    hint = "; is this the folder of a training run?"
    return read_record(Path(path) / "metrics.json", _FIELDS, hint)


def _are_times(value: object) -> bool:
    return isinstance(value, dict) and all(
        is_number(value.get(k)) for k in ("median", "p10", "p90")
    )


def _are_losses(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in value
    )


_FIELDS: dict[str, Field] = {
    "name": TEXT,
    "open_modules": COUNT,
    "total_modules": COUNT,
    "fraction_open": NUMBER,
    "trainable_parameters": COUNT,
    "steps": COUNT,
    "held_out_loss_before": or_null(NUMBER),
    "held_out_loss": or_null(NUMBER),
    "step_time_ms": Field("an object with the numbers median, p10 and p90", _are_times),
    "peak_memory_bytes": or_null(Field("an integer", is_count)),
    "tokens_per_step": NUMBER,
    "losses": Field("a list of [step, loss]", _are_losses),
    "device": TEXT,
    "dtype": TEXT,
}

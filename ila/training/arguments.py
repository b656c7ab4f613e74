"""Make ``TrainingArguments`` of a stage, and check the values that a user sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import TrainingArguments

from ila.runs.processes import processes

# TrainingArguments that a field of our configurations decides -> the name of that field.
_FIELDS = {
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "save_strategy": "save_every",
    "save_steps": "save_every",
}
_STEPS = ("max_steps", "num_train_epochs")
# Fixed values. ε-stability and the reports read the loss of every step, so every step is logged.
_FIXED = {
    "output_dir": "it is an argument of its own",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "disable_tqdm": "the argument progress decides it",
}


def check_training_args(extra: Mapping[str, object], steps: str) -> None:
    """Raise if ``training_args`` would override a field of the configuration, or are misspelt.

    Args:
        extra: The user's ``training_args``.
        steps: Names of the fields that hold the number of steps.

    Raises:
        ValueError: If a field or a fixed value decides a name of ``extra``, or a name is unknown.
        TypeError: If ``extra`` holds a value that JSON cannot express.
    """
    fields = _FIELDS | dict.fromkeys(_STEPS, steps)
    for name in extra:
        if name in fields:
            raise ValueError(f"training_args must not set {name!r}: set {fields[name]} instead")
        if name in _FIXED:
            raise ValueError(f"training_args must not set {name!r}: {_FIXED[name]}")
    unknown = sorted(set(extra) - set(TrainingArguments.__dataclass_fields__))
    if unknown:
        raise ValueError(f"training_args has names that TrainingArguments does not know: {unknown}")
    json.dumps(dict(extra))  # a run keeps them with its results


def arguments(
    output_dir: Path,
    *,
    steps: int,
    save_every: int | None,
    extra: Mapping[str, object],
    **own: object,
) -> TrainingArguments:
    """Make the TrainingArguments of one stage.

    Args:
        output_dir: Folder of the checkpoints.
        steps: Optimiser steps.
        save_every: Steps between checkpoints; None saves none.
        extra: The user's ``training_args``; they win over the defaults here.
        **own: Settings of this stage, by the names of ``TrainingArguments``.
    """
    ranks = processes()
    settings: dict[str, object] = {
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        # Closed layers have no parameters that require grad, so every such parameter is used.
        "ddp_find_unused_parameters": False,
        "use_cpu": ranks.num_processes > 1 and ranks.device.type == "cpu",
        **own,
        **extra,
    }
    return TrainingArguments(
        output_dir=str(output_dir), max_steps=steps, logging_steps=1, disable_tqdm=True, **settings
    )

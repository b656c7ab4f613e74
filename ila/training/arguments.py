"""``TrainingArguments`` of a stage, and what a user may set of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainingArguments,
)

from ila.runs.processes import processes

# TrainingArguments that a field of our configurations decides, and the name of that field.
_FIELDS = {
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "save_strategy": "save_every",
    "save_steps": "save_every",
}
_STEPS = ("max_steps", "num_train_epochs")
# What nobody decides: every step is logged, because ε-stability and the reports read the losses.
_FIXED = {
    "output_dir": "it is an argument of its own",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "disable_tqdm": "the argument progress decides it",
}


def check_training_args(extra: Mapping[str, Any], steps: str) -> None:
    """Refuse ``training_args`` that would override the configuration unseen, or are misspelt.

    Args:
        extra: The user's ``training_args``.
        steps: What the configuration calls its number of steps.

    Raises:
        ValueError: If ``extra`` holds a name that is decided elsewhere, or an unknown one.
        TypeError: If it holds what JSON cannot.
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
    json.dumps(dict(extra))  # they are kept with what they lead to


def arguments(
    output_dir: Path, *, steps: int, save_every: int | None, extra: Mapping[str, Any], **own: Any
) -> TrainingArguments:
    """TrainingArguments of one stage.

    Args:
        output_dir: Where checkpoints go.
        steps: Optimiser steps.
        save_every: Steps between checkpoints; None saves none.
        extra: The user's ``training_args``, which win over the defaults here.
        **own: This stage's settings, by the names of ``TrainingArguments``.
    """
    ranks = processes()
    settings: dict[str, Any] = {
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        # Every parameter that requires grad is used: closed layers have none.
        "ddp_find_unused_parameters": False,
        "use_cpu": ranks.num_processes > 1 and ranks.device.type == "cpu",
        **own,
        **extra,
    }
    return TrainingArguments(
        output_dir=str(output_dir), max_steps=steps, logging_steps=1, disable_tqdm=True, **settings
    )

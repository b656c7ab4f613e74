"""Check the settings of a training before it claims its folder, and before its first step."""

from __future__ import annotations

from typing import Protocol

from torch import nn
from transformers import TrainingArguments

from ila.data.contracts import Dataset
from ila.training.arguments import check_usable
from ila.training.loraplus import check_loraplus
from ila.training.packing import check_packing


class Settings(Protocol):
    """Fields that a training and stage 1 of a search share."""

    training_args: object
    eval_every: int | None
    packing: bool
    loraplus_lr_ratio: float | None


def check_settings(
    config: Settings,
    args: TrainingArguments,
    model: nn.Module,
    dataset: Dataset,
    held_out: Dataset | None,
) -> None:
    """Raise if a training cannot begin with these settings.

    Args:
        config: Settings.
        args: Trainer's arguments for them.
        model: Model to train.
        dataset: Rows to train on.
        held_out: Rows to evaluate on.

    Raises:
        ValueError: If there is no row to evaluate on, the optimiser, the schedule or a report
            cannot be made, or packing would not be exact.
    """
    if config.eval_every is not None and not held_out:
        raise ValueError(
            f"eval_every={config.eval_every} needs held-out rows to evaluate on, got none"
        )
    check_usable(args, config.training_args, model)
    check_loraplus(config.loraplus_lr_ratio, args, model)
    if config.packing:
        check_packing(model, dataset)

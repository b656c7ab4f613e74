"""``transformers.Trainer`` as the search and the training use it: arguments and callbacks.

Precision, accumulation, logging, resuming and distributed launch are Trainer's own; whatever is
not decided here can be given as ``training_args``, by the names of ``TrainingArguments``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerState,
)

from ila.boundary import writing
from ila.data.encoding import Collator
from ila.models.lean_head import leaning
from ila.runs.checkpoints import is_finished, last_complete
from ila.runs.processes import on_main_process, processes, sum_over_processes
from ila.training.callbacks import ProgressBar

# What accelerate puts on a model and leaves there. The mark would make it pass the model over when
# the next stage prepares it: no autocast, no compilation.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def default_collator(model: nn.Module) -> Collator:
    """Right padding with the model's pad id, else its end id, else 0; padding carries no loss."""
    config = getattr(model, "config", None)
    for value in (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)):
        if isinstance(value, (list, tuple)):
            value = value[0]
        if value is not None:
            return Collator(value)
    return Collator(0)


def check_dataset(dataset: Any) -> None:
    """Raise unless ``dataset`` is a non-empty sequence of rows with token ids and labels."""
    try:
        count = len(dataset)
    except TypeError:
        raise TypeError(
            f"dataset must have a length and be indexable, got {type(dataset).__name__}"
        ) from None
    if count == 0:
        raise ValueError("dataset must hold at least one row, got none")
    row = dataset[0]
    if not isinstance(row, Mapping) or not {"input_ids", "labels"} <= set(row):
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"dataset rows must have input_ids and labels, got {found}")


def run(trainer: Trainer, resume_from: Path | None) -> None:
    """Train, quietly, from a checkpoint if there is one.

    Trainer asks whether it is done only after a step, so a run that was killed between its last
    checkpoint and its result would train one step too many: a finished checkpoint is only loaded.
    """
    trainer.remove_callback(PrinterCallback)
    _name_what_cannot_be_written(trainer)
    if resume_from is not None and is_finished(resume_from):
        trainer._load_from_checkpoint(str(resume_from))
        trainer.state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
        return
    if trainer.is_fsdp_enabled and isinstance(trainer.model, FSDPModule):
        _check_sharded(trainer.model)
        # Accelerate would look again for the classes to shard, by names that sharding has changed.
        trainer.accelerator.state.fsdp_plugin.auto_wrap_policy = None
    try:
        with _unprepared_after(trainer.model), leaning(trainer.model):
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.close()


@contextmanager
def _unprepared_after(model: nn.Module) -> Iterator[None]:
    """Take off a model again what accelerate puts on it inside."""
    attributes = vars(model)
    before = {name: attributes[name] for name in _PREPARED if name in attributes}
    try:
        yield
    finally:
        for name in _PREPARED:
            attributes.pop(name, None)
        attributes.update(before)


def _name_what_cannot_be_written(trainer: Trainer) -> None:
    """Let a checkpoint that cannot be saved name its folder, whichever library writes it."""
    save = trainer._save_checkpoint

    def named(*args: Any, **kwargs: Any) -> None:
        with writing(trainer.args.output_dir):
            save(*args, **kwargs)

    trainer._save_checkpoint = named


def _check_sharded(model: nn.Module) -> None:
    """Raise if a model that an earlier run sharded cannot be trained again as it is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    empty = sum(isinstance(p, DTensor) and p.to_local().numel() == 0 for p in trained)
    if sum_over_processes([empty])[0]:
        raise ValueError(
            "peft_model must be loaded again before it is trained: it is sharded already, over "
            "more processes than some parameters have rows, and accelerate would confuse those"
        )


def resume_point(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if resuming was asked for and there is one."""
    return on_main_process(lambda: last_complete(folder)) if resume else None


def losses(trainer: Trainer) -> list[list[float]]:
    """[step, loss] of every logged step, the resumed ones included."""
    return [[e["step"], float(e["loss"])] for e in trainer.state.log_history if "loss" in e]


def held_out_loss(
    model: nn.Module, dataset: Sequence[Mapping[str, Any]], collator: Any, batch_size: int
) -> float:
    """Mean cross-entropy per answer token over a data set, in nats; the mode is kept.

    Several processes share the batches and get the same number.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ranks = processes()
    starts = range(0, len(dataset), batch_size)
    total, count = 0.0, 0
    with torch.no_grad(), leaning(model):
        # All run the model equally often: where it is sharded, each forward is a joint one.
        for turn in range(0, len(starts), ranks.num_processes):
            mine = turn + ranks.process_index
            start = starts[min(mine, len(starts) - 1)]
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = {name: value.to(device) for name, value in collator(rows).items()}
            loss = float(model(**batch).loss)
            # The first position predicts nothing, so its label carries no loss.
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            if tokens and mine < len(starts):  # the mean over none is NaN
                total += loss * tokens
                count += tokens
    model.train(training)
    total, count = sum_over_processes([total, count])
    if count == 0:
        raise ValueError(f"dataset must have a label to predict; its {len(dataset)} rows have none")
    return total / count

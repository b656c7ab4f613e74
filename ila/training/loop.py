"""Run ``transformers.Trainer`` for the search and the training, and measure held-out loss.

Precision, accumulation, logging, resuming and distributed launch are Trainer's own; the user can
set all other options in ``training_args``, by the names of ``TrainingArguments``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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
from ila.data.contracts import IGNORED, Collate, Dataset
from ila.data.encoding import Collator
from ila.models.adalora import unregularised
from ila.models.lean_head import leaning
from ila.runs.checkpoints import is_finished, last_complete
from ila.runs.processes import on_main_process, processes, sum_over_processes
from ila.training.callbacks import ProgressBar
from ila.training.verdicts import settle_verdicts

# Accelerate puts these on a model and leaves them there. By the mark it would skip the model when
# the next stage prepares it: no autocast, no compilation.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def default_collator(model: nn.Module) -> Collator:
    """Return a collator that pads with the model's pad id, else its end id, else 0."""
    config = getattr(model, "config", None)
    for value in (getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)):
        if isinstance(value, (list, tuple)):
            value = value[0]
        if value is not None:
            return Collator(value)
    return Collator(0)


def check_dataset(dataset: Dataset) -> None:
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
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"dataset rows must have input_ids and labels, got {got}")


def run(trainer: Trainer, resume_from: Path | None) -> None:
    """Train without printing, from a checkpoint if there is one.

    Trainer checks its end only after a step: a run killed between its last checkpoint and its
    result would train one step too many. So this function only loads a finished checkpoint.
    """
    trainer.remove_callback(PrinterCallback)
    settle_verdicts(trainer.args.device, Path(trainer.args.output_dir).parent)
    _name_folder_in_errors(trainer)
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


def shard(trainer: Trainer) -> None:
    """Shard the model of a trainer as its training would; nothing without FSDP2."""
    if trainer.is_fsdp_enabled and not isinstance(trainer.model, FSDPModule):
        with _unprepared_after(trainer.model):
            trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())


@contextmanager
def _unprepared_after(model: nn.Module) -> Iterator[None]:
    """Remove the attributes that accelerate sets on a model inside the block."""
    attributes = vars(model)
    before = {name: attributes[name] for name in _PREPARED if name in attributes}
    try:
        yield
    finally:
        for name in _PREPARED:
            attributes.pop(name, None)
        attributes.update(before)


def _name_folder_in_errors(trainer: Trainer) -> None:
    """Make an error of saving a checkpoint name its folder, from any library."""
    save = trainer._save_checkpoint

    def named(*args: object, **kwargs: object) -> None:
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
    """Return the checkpoint to continue from, if there is one and the run resumes."""
    return on_main_process(lambda: last_complete(folder)) if resume else None


def losses(trainer: Trainer) -> list[list[float]]:
    """Return [step, loss] of every logged step, also of resumed parts."""
    return [[e["step"], float(e["loss"])] for e in trainer.state.log_history if "loss" in e]


def held_out_loss(model: nn.Module, dataset: Dataset, collator: Collate, batch_size: int) -> float:
    """Return the mean cross-entropy per answer token over a data set, in nats.

    The model keeps its mode. Several processes share the batches and get the same number.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ranks = processes()
    starts = range(0, len(dataset), batch_size)
    total, count = 0.0, 0
    with torch.no_grad(), leaning(model), unregularised(model):
        # Every process runs the model equally often: all take part in the forward of a sharded one.
        for turn in range(0, len(starts), ranks.num_processes):
            mine = turn + ranks.process_index
            start = starts[min(mine, len(starts) - 1)]
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = {name: value.to(device) for name, value in collator(rows).items()}
            loss = float(model(**batch).loss)
            # The first position predicts nothing, so its label carries no loss.
            tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            if tokens and mine < len(starts):  # the mean over none is NaN
                total += loss * tokens
                count += tokens
    model.train(training)
    total, count = sum_over_processes([total, count])
    if count == 0:
        raise ValueError(f"dataset must have a label to predict; its {len(dataset)} rows have none")
    return total / count

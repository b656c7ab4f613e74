"""``transformers.Trainer`` as the search and the training use it: arguments and callbacks.

Precision, accumulation, logging, resuming and distributed launch are Trainer's own; whatever is
not decided here can be given as ``training_args``, by the names of ``TrainingArguments``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from ila.data.encoding import Collator
from ila.runs.atomic import write_text_atomic
from ila.runs.checkpoints import MarkComplete, is_finished, last_complete
from ila.runs.processes import on_main_process, processes, sum_over_processes

# What accelerate puts on a model and leaves there. The mark would make it pass the model over when
# the next stage prepares it: no autocast, no compilation.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
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
    if resume_from is not None and is_finished(resume_from):
        trainer._load_from_checkpoint(str(resume_from))
        trainer.state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
        return
    if trainer.is_fsdp_enabled and isinstance(trainer.model, FSDPModule):
        _check_sharded(trainer.model)
        # Accelerate would look again for the classes to shard, by names that sharding has changed.
        trainer.accelerator.state.fsdp_plugin.auto_wrap_policy = None
    attributes = vars(trainer.model)
    before = {name: attributes[name] for name in _PREPARED if name in attributes}
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        for name in _PREPARED:
            attributes.pop(name, None)
        attributes.update(before)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.close()


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


def stage_callbacks(
    title: str, log: LogFile | None, *, progress: bool, also_save=None
) -> list[TrainerCallback]:
    """Callbacks of every stage: progress bar, log file, stop at NaN, complete checkpoints."""
    found: list[TrainerCallback] = [StopAtNan(), MarkComplete(also_save)]
    if progress:
        found.append(ProgressBar(title))
    if log is not None:
        found.append(log)
    return found


class ProgressBar(TrainerCallback):
    """A progress bar on stderr with the last loss."""

    def __init__(self, title: str):
        self.title = title
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_local_process_zero:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.progress.start()
        self.task = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress is not None and logs and "loss" in logs:
            self.progress.update(self.task, note=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Stop drawing; also called when training ends by an exception."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StopAtNan(TrainerCallback):
    """Ends the run with an error at the first loss that is not finite."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"the loss became {loss} at step {state.global_step}; "
                "try a lower learning rate or another dtype"
            )


class LogFile(TrainerCallback):
    """Appends one JSON line per optimiser step: ``{"stage", "step", "loss", …}``.

    When a run is resumed, lines of steps that will be run again are removed first.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut off by the kill that made resuming necessary
            if entry.get("stage") != self.stage or entry.get("step", 0) <= state.global_step:
                kept.append(line + "\n")
        write_text_atomic(self.path, "".join(kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            keep = {k: logs[k] for k in ("loss", "grad_norm", "learning_rate") if k in logs}
            self.write(step=state.global_step, **{k: float(v) for k, v in keep.items()})

    def write(self, **entry: Any) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, **entry}) + "\n")


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
    with torch.no_grad():
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

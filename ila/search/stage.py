"""Hold the parts of a search, and run one stage of training in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ila.data.contracts import Collate, Dataset
from ila.runs.folder import RUN_MARKER, claim
from ila.runs.meter import StepMeter
from ila.runs.processes import on_main_process
from ila.search.config import SearchConfig
from ila.search.gate_gradients import LayerMean, SignalTrainer
from ila.training.arguments import arguments
from ila.training.callbacks import LogFile, stage_callbacks
from ila.training.evaluation import evaluate_on
from ila.training.loop import resume_point, run
from ila.training.packing import packing_collator
from ila.training.trained import Trained


class Updates(Trained, Protocol):
    """Updates that a search trains in stage 1 and scores, one for each layer.

    ``adapter_updates.AdapterUpdates`` are α B A of an adapter, ``weight_updates.WeightUpdates`` are
    W − W₀ of layers trained in full.

    Attributes:
        adapter: Name under which layers keep their score.
        folder: Folder of the trained tensors, below the folder of the search.
        label: Name of the trained part, for the screen.
        layers: Module name -> layer, every one open.
    """

    adapter: str
    folder: str
    label: str
    layers: Mapping[str, nn.Module]

    def signal(self) -> LayerMean:
        """Return the importance that stage 1 measures at no extra step."""

    def scored(self, score_init: float) -> AbstractContextManager[None]:
        """Give every layer a gate and freeze all else, inside a ``with``."""


@dataclass(frozen=True)
class Search:
    """A search: updates, data, configuration, folder.

    Attributes:
        updates: Updates to score, every layer open.
        dataset: Rows with ``input_ids`` and ``labels``.
        collator: Turns rows into a batch.
        config: Options.
        folder: Folder of the checkpoints.
        keep: Whether the folder outlives the search.
        resume: Whether to continue the search that the folder holds.
        progress: Whether to show progress bars.
        after_step: Gets the number of finished steps and the free signal after each step of
            stage 1.
        held_out: Rows for the evaluations of stage 1.
        callbacks: Callbacks of the user, for stage 1.
    """

    updates: Updates
    dataset: Dataset
    collator: Collate
    config: SearchConfig
    folder: Path
    keep: bool
    resume: bool
    progress: bool
    after_step: Callable[[int, LayerMean], None] | None = None
    held_out: Dataset | None = None
    callbacks: Sequence[TrainerCallback] = ()

    def claim(self) -> None:
        """Mark the folder as this search's, or check that it is."""
        if self.keep:
            mine = {
                "config": self.config.as_dict(),
                "adapter": self.updates.adapter,
                "layers": list(self.updates.layers),
                "rows": len(self.dataset),
            }
            claim(self.folder, mine, marker="search.json", resume=self.resume, beside=(RUN_MARKER,))

    def log(self, stage: str) -> LogFile | None:
        """Return the log of a stage; None if the search keeps no files."""
        return LogFile(self.folder / "log.jsonl", stage) if self.keep else None

    def save_every(self) -> int | None:
        """Return the steps between checkpoints; None if the search keeps no files."""
        return self.config.save_every if self.keep else None


@dataclass(frozen=True)
class EndedStage:
    """Trainer of a finished stage, and the wall time of its steps in seconds."""

    trainer: Trainer
    seconds: float

    @property
    def steps(self) -> int:
        """Return the number of optimiser steps."""
        return self.trainer.state.global_step


def train_stage(search: Search, trainer_class: type[SignalTrainer], **options: Any) -> EndedStage:
    """Run one stage to its end, from its last complete checkpoint if the search resumes.

    Args:
        search: Search.
        trainer_class: Class of the trainer.
        **options: Options of ``make_trainer``.
    """
    ready = make_trainer(search, trainer_class, **options)
    run(ready.trainer, ready.start)
    seconds = on_main_process(lambda: sum(ready.meter.times_ms) / 1e3)
    return EndedStage(ready.trainer, seconds)


def _arguments(
    search: Search, stage: str, steps: int, keep_settings: bool, settings: Mapping[str, Any]
) -> TrainingArguments:
    extra = search.config.training_args
    if keep_settings:
        extra = {name: value for name, value in extra.items() if name not in settings}
    return arguments(
        search.folder / stage,
        steps=steps,
        save_every=search.save_every(),
        extra=extra,
        per_device_train_batch_size=search.config.batch_size,
        seed=search.config.seed,
        **settings,
    )


class ReadyStage(NamedTuple):
    """A stage before its first step.

    Attributes:
        trainer: Trainer of the stage.
        meter: Measures time and memory.
        start: Checkpoint to continue from; None at a fresh start.
    """

    trainer: Trainer
    meter: StepMeter
    start: Path | None


def make_trainer(
    search: Search,
    trainer_class: type[SignalTrainer],
    *,
    stage: str,
    title: str,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
    more: Sequence[TrainerCallback] = (),
    signal: LayerMean | None = None,
    keep_settings: bool = False,
    **settings: Any,
) -> ReadyStage:
    """Make the Trainer of one stage, with its callbacks and its checkpoint.

    Args:
        search: Search.
        trainer_class: Class of the trainer.
        stage: Name of the stage: of its folder and in its log.
        title: Text of the progress bar.
        steps: Optimiser steps.
        callbacks: Further callbacks.
        more: Callbacks of the user.
        signal: Mean to gather and to keep in checkpoints.
        keep_settings: Whether ``settings`` win over the ``training_args`` of the search.
        **settings: Further ``TrainingArguments`` by name.
    """
    args = _arguments(search, stage, steps, keep_settings, settings)
    meter = StepMeter(args.device)
    kept = [meter] if signal is None else [meter, signal]
    own = stage_callbacks(
        title,
        search.log(stage),
        progress=search.progress,
        also_save=lambda checkpoint: [each.save(checkpoint) for each in kept],
        more=more,
    )
    make = search.updates.trainer_class(trainer_class)
    trainer = make(
        search.updates.model,
        args,
        packing_collator() if search.config.packing else search.collator,
        search.dataset,
        eval_dataset=search.held_out,
        callbacks=[*kept, *callbacks, *own],
    )
    trainer.signal = signal
    if search.held_out:
        evaluate_on(trainer, search.held_out, search.collator, search.config.batch_size)
    start = resume_point(search.folder / stage, search.resume)
    if start is not None:
        for each in kept:
            each.load(start)
    return ReadyStage(trainer, meter, start)

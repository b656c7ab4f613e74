"""A search and one stage of training in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import Trainer, TrainerCallback

from ila.runs.folder import RUN_MARKER, claim
from ila.runs.meter import StepMeter
from ila.runs.processes import on_main_process
from ila.search.config import SearchConfig
from ila.search.gate_gradients import LayerMean, SignalTrainer
from ila.training.arguments import arguments
from ila.training.callbacks import LogFile, stage_callbacks
from ila.training.loop import resume_point, run
from ila.training.trained import Trained


class Updates(Trained, Protocol):
    """The updates that a search trains in stage 1 and scores, one for each layer.

    ``adapter_updates.AdapterUpdates`` are α B A of an adapter, ``weight_updates.WeightUpdates`` are
    W − W₀ of layers trained in full.

    Attributes:
        adapter: The name under which layers keep their score.
        folder: Where stage 1 keeps what it trained, below the folder of the search.
        label: What stage 1 trains, in words.
        layers: Module name -> layer, every one open.
    """

    adapter: str
    folder: str
    label: str
    layers: Mapping[str, nn.Module]

    def signal(self) -> LayerMean:
        """Return the importance that stage 1 measures for free."""

    def scored(self, score_init: float) -> AbstractContextManager[None]:
        """Give every layer a gate and freeze all else, inside a ``with``."""


@dataclass(frozen=True)
class Search:
    """A search: updates, data, configuration, folder.

    Attributes:
        updates: The updates to score, every layer open.
        dataset: Rows with ``input_ids`` and ``labels``.
        collator: Rows to a batch.
        config: How to search.
        folder: Where checkpoints go.
        keep: Whether the folder outlives the search.
        resume: Whether to go on from what the folder holds.
        progress: Whether to show progress bars.
        after_step: Called after each step of stage 1 with the steps done and the free signal.
    """

    updates: Updates
    dataset: Sequence[Mapping[str, Any]]
    collator: Any
    config: SearchConfig
    folder: Path
    keep: bool
    resume: bool
    progress: bool
    after_step: Callable[[int, LayerMean], None] | None = None

    def claim(self) -> None:
        """Mark the folder as this search's, or check that it is."""
        if self.keep:
            mine = {"config": self.config.as_dict(), "adapter": self.updates.adapter}
            mine |= {"layers": list(self.updates.layers), "rows": len(self.dataset)}
            where = {"marker": "search.json", "beside": (RUN_MARKER,)}
            claim(self.folder, mine, resume=self.resume, **where)

    def log(self, stage: str) -> LogFile | None:
        return LogFile(self.folder / "log.jsonl", stage) if self.keep else None

    def save_every(self) -> int | None:
        return self.config.save_every if self.keep else None


@dataclass(frozen=True)
class EndedStage:
    """A stage that has ended: its trainer, and the wall time of its steps in seconds."""

    trainer: Trainer
    seconds: float

    @property
    def steps(self) -> int:
        return self.trainer.state.global_step


def train_stage(search: Search, trainer_class: type[SignalTrainer], **options: Any) -> EndedStage:
    """Run one stage to its end, from its last complete checkpoint when resuming.

    Args:
        search: The search.
        trainer_class: Kind of trainer.
        **options: See ``make_trainer``.
    """
    trainer, costs, start = make_trainer(search, trainer_class, **options)
    run(trainer, start)
    return EndedStage(trainer, on_main_process(lambda: sum(costs.times_ms) / 1e3))


def make_trainer(
    search: Search,
    trainer_class: type[SignalTrainer],
    *,
    stage: str,
    title: str,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
    signal: LayerMean | None = None,
    **settings: Any,
) -> tuple[Trainer, StepMeter, Path | None]:
    """The Trainer of one stage, what it costs, and the checkpoint that it goes on from."""
    folder = search.folder / stage
    extra = search.config.training_args
    if stage == "stage2":
        extra = {name: value for name, value in extra.items() if name not in settings}
    args = arguments(
        folder,
        steps=steps,
        save_every=search.save_every(),
        extra=extra,
        per_device_train_batch_size=search.config.batch_size,
        seed=search.config.seed,
        **settings,
    )
    costs = StepMeter(args.device)
    kept = [costs, *([] if signal is None else [signal])]
    own = stage_callbacks(
        title,
        search.log(stage),
        progress=search.progress,
        also_save=lambda checkpoint: [each.save(checkpoint) for each in kept],
    )
    callbacks = [*kept, *callbacks, *own]
    make = search.updates.trainer_class(trainer_class)
    trainer = make(search.updates.model, args, search.collator, search.dataset, callbacks=callbacks)
    trainer.signal = signal
    start = resume_point(folder, search.resume)
    if start is not None:
        for each in kept:
            each.load(start)
    return trainer, costs, start

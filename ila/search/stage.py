"""One search: what it works on, and a stage of training in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ila.runs.folder import RUN_MARKER, claim
from ila.runs.meter import Costs
from ila.runs.processes import on_main_process
from ila.search.adapter_updates import AdapterUpdates
from ila.search.config import SearchConfig
from ila.search.gate_gradients import LayerMean, SignalTrainer
from ila.search.weight_updates import FullUpdates
from ila.training.loop import LogFile, arguments, resume_point, run, stage_callbacks


@dataclass(frozen=True)
class Work:
    """One search: what is searched on which data, and the folder of it.

    Attributes:
        what: The updates to score, every layer open.
        dataset: Rows with ``input_ids`` and ``labels``.
        collator: Rows to a batch.
        config: How to search.
        folder: Where checkpoints go.
        keep: Whether the folder outlives the search.
        resume: Whether to go on from what the folder holds.
        progress: Whether to show progress bars.
        after_step: Called after each step of stage 1 with the steps done and the free signal.
    """

    what: AdapterUpdates | FullUpdates
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
            mine = {"config": self.config.as_dict(), "adapter": self.what.adapter}
            mine |= {"layers": list(self.what.layers), "rows": len(self.dataset)}
            where = {"marker": "search.json", "beside": (RUN_MARKER,)}
            claim(self.folder, mine, resume=self.resume, **where)

    def log(self, stage: str) -> LogFile | None:
        return LogFile(self.folder / "log.jsonl", stage) if self.keep else None

    def save_every(self) -> int | None:
        return self.config.save_every if self.keep else None


@dataclass(frozen=True)
class Trained:
    """A stage that has ended: its trainer, and the wall time of its steps in seconds."""

    trainer: Trainer
    seconds: float

    @property
    def steps(self) -> int:
        return self.trainer.state.global_step


def train_stage(work: Work, trainer_class: type[SignalTrainer], **options: Any) -> Trained:
    """Run one stage to its end, from its last complete checkpoint when resuming.

    Args:
        work: The search.
        trainer_class: Kind of trainer.
        **options: See ``make_trainer``.
    """
    trainer, costs, start = make_trainer(work, trainer_class, **options)
    run(trainer, start)
    return Trained(trainer, on_main_process(lambda: sum(costs.times_ms) / 1e3))


def make_trainer(
    work: Work,
    trainer_class: type[SignalTrainer],
    *,
    stage: str,
    title: str,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
    signal: LayerMean | None = None,
    **settings: Any,
) -> tuple[Trainer, Costs, Path | None]:
    """The Trainer of one stage, what it costs, and the checkpoint that it goes on from."""
    folder = work.folder / stage
    extra = work.config.training_args
    if stage == "stage2":
        extra = {name: value for name, value in extra.items() if name not in settings}
    args = arguments(
        folder,
        steps=steps,
        save_every=work.save_every(),
        extra=extra,
        per_device_train_batch_size=work.config.batch_size,
        seed=work.config.seed,
        **settings,
    )
    costs = Costs(args.device)
    kept = [costs, *([] if signal is None else [signal])]
    own = stage_callbacks(
        title,
        work.log(stage),
        progress=work.progress,
        also_save=lambda checkpoint: [each.save(checkpoint) for each in kept],
    )
    callbacks = [*kept, *callbacks, *own]
    make = work.what.trainer(trainer_class)
    trainer = make(args, work.collator, work.dataset, callbacks=callbacks)
    trainer.signal = signal
    start = resume_point(folder, work.resume)
    if start is not None:
        for each in kept:
            each.load(start)
    return trainer, costs, start

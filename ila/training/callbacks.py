"""Callbacks of every stage: progress bar, log file, stop at NaN, complete checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ila.runs.atomic import write_text_atomic
from ila.runs.checkpoints import MarkComplete


def stage_callbacks(
    title: str,
    log: LogFile | None,
    *,
    progress: bool,
    also_save: Callable[[Path], object] | None = None,
    more: Sequence[TrainerCallback] = (),
) -> list[TrainerCallback]:
    """Make the callbacks of a stage.

    Args:
        title: Text before the progress bar.
        log: Log file of the stage, if it keeps one.
        progress: Whether to show a progress bar.
        also_save: Adds files to each checkpoint folder.
        more: Callbacks of the user, which run first.
    """
    callbacks: list[TrainerCallback] = [*more, StopAtNan(), MarkComplete(also_save)]
    if progress:
        callbacks.append(ProgressBar(title))
    if log is not None:
        callbacks.append(log)
    return callbacks


class ProgressBar(TrainerCallback):
    """Draw a progress bar on stderr with the last loss."""

    def __init__(self, title: str):
        self.title = title
        self.progress: Progress | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Start to draw, on one process of each machine."""
        if not state.is_local_process_zero:
            return
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),  # it holds names of folders
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        self.progress.start()
        self.task = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the loss."""
        if self.progress is not None and logs and "loss" in logs:
            self.progress.update(self.task, note=f"loss {float(logs['loss']):.3f}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop drawing."""
        self.close()

    def close(self) -> None:
        """Stop drawing; call this also when training ends by an exception."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StopAtNan(TrainerCallback):
    """End the run with an error at the first loss that is not finite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Raise unless the loss is finite."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"the loss became {loss} at step {state.global_step}; "
                "try a lower learning rate or another dtype"
            )


class LogFile(TrainerCallback):
    """Append one JSON line per optimiser step: ``{"stage", "step", "loss", …}``.

    An evaluation has a line of its own: ``{"stage", "step", "held_out_loss"}``.
    A resumed run first removes the lines of steps that it will run again.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Remove the lines of steps that run again."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text("utf-8", "replace").splitlines():
            place = _place_of(line)
            if place is not None and (place[0] != self.stage or place[1] <= state.global_step):
                kept.append(line + "\n")
        write_text_atomic(self.path, "".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the line of a step, or of an evaluation."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            keep = {k: logs[k] for k in ("loss", "grad_norm", "learning_rate") if k in logs}
            self.write(step=state.global_step, **{k: float(v) for k, v in keep.items()})
        if "eval_loss" in logs:
            self.write(step=state.global_step, held_out_loss=float(logs["eval_loss"]))

    def write(self, **entry: object) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, **entry}) + "\n")


def _place_of(line: str) -> tuple[str, float] | None:
    """Return stage and step of a line of the log; None if a kill cut the line off."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step", 0), int | float):
        return None
    return str(entry.get("stage")), entry.get("step", 0)

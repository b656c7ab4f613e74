"""Callbacks of every stage: progress bar, log file, stop at NaN, complete checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    TrainerCallback,
)

from ila.runs.atomic import write_text_atomic
from ila.runs.checkpoints import MarkComplete


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
        for line in self.path.read_text("utf-8", "replace").splitlines():
            place = _place_of(line)
            if place is not None and (place[0] != self.stage or place[1] <= state.global_step):
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


def _place_of(line: str) -> tuple[str, float] | None:
    """Stage and step of a line of the log; None if it is damaged, as one cut off by a kill is."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step", 0), int | float):
        return None
    return str(entry.get("stage")), entry.get("step", 0)

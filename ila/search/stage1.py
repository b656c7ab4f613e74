"""Run stage 1 until ε-stability: |E L(θₜ₊₁) − E L(θₜ)| < ε.

E is the mean loss over a window of steps; stage 1 ends when two successive windows differ by less
than ε. The rule reads Trainer's own log, so that a resumed run decides like an unbroken one.
Source: the stopping rule of stage 1 in arXiv 2410.17875.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ila.boundary import writing
from ila.data.contracts import Dataset
from ila.masks.provenance import Course
from ila.runs.atomic import write_folder_atomic, write_json_atomic
from ila.runs.processes import on_main_process
from ila.runs.records import COUNT, NUMBER, NUMBERS, RATE, TEXT, Field, is_number, read_record
from ila.search.baselines import UNTRAINED
from ila.search.config import SearchConfig
from ila.search.gate_gradients import LayerMean, SignalTrainer
from ila.search.stage import Search, train_stage
from ila.training.arguments import arguments
from ila.training.checks import check_settings
from ila.training.evaluation import evaluated
from ila.training.loop import losses
from ila.training.loraplus import with_loraplus


class Stage1(Course):
    """Result of stage 1; a method without stage 1 has 0 steps and empty signals.

    Attributes:
        gate_gradient: Module name -> free signal of its gate.
        folds: The same signal over disjoint parts of the steps, in the order of the layers.
        seconds: Wall time of the steps.
    """

    gate_gradient: dict[str, float]
    folds: list[list[float]]
    seconds: float


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


_RESULT = {
    "steps": COUNT,
    "stopped": TEXT,
    "gate_gradient": NUMBERS,
    "loss_window": COUNT,
    "first_window_loss": NUMBER,
    "last_window_loss": NUMBER,
    "folds": Field(
        "a list of lists of finite numbers",
        lambda value: isinstance(value, list) and all(map(_are_numbers, value)),
    ),
}


class StopWhenStable(TrainerCallback):
    """Stop training at ε-stability.

    Args:
        epsilon: ε in nats; 0 never stops.
        window: Steps in a window, ≥ 1.
    """

    def __init__(self, epsilon: float, window: int):
        self.epsilon, self.window = epsilon, window

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Ask Trainer to stop if the loss is stable."""
        if self.stable(state):
            control.should_training_stop = True

    def stable(self, state: TrainerState) -> bool:
        """Tell whether the last two whole windows differ by less than ε."""
        recent = self._losses(state)[-2 * self.window :]
        if self.epsilon == 0.0 or len(recent) < 2 * self.window:
            return False
        before, after = recent[: self.window], recent[self.window :]
        return abs(sum(after) - sum(before)) / self.window < self.epsilon

    @staticmethod
    def _losses(state: TrainerState) -> list[float]:
        return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


class _EachStep(TrainerCallback):
    """Call ``Search.after_step`` with the finished steps and the free signal so far."""

    def __init__(self, search: Search, signal: LayerMean):
        self.search, self.signal = search, signal

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.search.after_step is not None:
            self.search.after_step(state.global_step, self.signal)


def run_stage1(search: Search) -> Stage1:
    """Run stage 1, or read its result; a method without stage 1 gets an empty course.

    Afterwards the model holds the trained tensors.
    """
    config, done = search.config, search.folder / "stage1.json"
    if config.method in UNTRAINED:
        return {"steps": 0, "gate_gradient": {}, "folds": [], "seconds": 0.0}
    if search.resume and on_main_process(done.exists):
        search.updates.load(search.folder / search.updates.folder)
        cost = read_record(search.folder / "cost.json", {"seconds": RATE})
        result = read_record(done, _RESULT)
        if set(result["gate_gradient"]) != set(search.updates.layers):
            raise ValueError(f"{done}: gate_gradient must name the layers of the model")
        return {**result, **cost}
    signal = search.updates.signal()
    stable = StopWhenStable(config.epsilon, config.stability_window)
    trained = train_stage(
        search,
        with_loraplus(SignalTrainer, config.loraplus_lr_ratio),
        stage="stage1",
        title=f"Stage 1: {search.updates.label}",
        steps=config.stage1_steps,
        callbacks=[stable, _EachStep(search, signal)],
        more=search.callbacks,
        signal=signal,
        **_settings(config),
    )
    result: Stage1 = {
        "steps": trained.steps,
        "stopped": "stable" if stable.stable(trained.trainer.state) else "budget",
        **_course([loss for _, loss in losses(trained.trainer)], config.stability_window),
        **evaluated(trained.trainer, config.eval_every),
        "gate_gradient": signal.mean(),
        "folds": signal.folds(),
        "seconds": trained.seconds,
    }
    if search.keep:
        state = search.updates.state()
        on_main_process(lambda: _keep(search, state, result))
    return result


def check_search(
    config: SearchConfig, model: nn.Module, dataset: Dataset, held_out: Dataset | None
) -> None:
    """Raise if stage 1 cannot begin with these settings; see ``check_settings``."""
    args = arguments(
        Path("stage1"),
        steps=config.stage1_steps,
        save_every=None,
        extra=config.training_args,
        **_settings(config),
    )
    check_settings(config, args, model, dataset, held_out)


def _settings(config: SearchConfig) -> dict[str, Any]:
    """Return the settings of stage 1, which ``training_args`` may change."""
    return {
        "learning_rate": config.learning_rate,
        "warmup_steps": round(0.03 * config.stage1_steps),
        "eval_every": config.eval_every,
    }


def _keep(search: Search, state: dict[str, Tensor], result: Stage1) -> None:
    """Write the trained tensors and the result; ``stage1.json`` last, as the mark of the end."""
    course = {name: value for name, value in result.items() if name != "seconds"}
    place = search.folder / search.updates.folder
    with write_folder_atomic(place, replace=True) as target, writing(place):
        search.updates.save(target, state)
    write_json_atomic(search.folder / "cost.json", {"seconds": result["seconds"]})
    write_json_atomic(search.folder / "stage1.json", course)


def _course(losses: Sequence[float], window: int) -> Course:
    """Return the mean loss of the first and of the last steps: as many of each, no step in both."""
    window = max(1, min(window, len(losses) // 2))
    first, last = losses[:window], losses[-window:]
    return {
        "first_window_loss": sum(first) / window,
        "last_window_loss": sum(last) / window,
        "loss_window": window,
    }

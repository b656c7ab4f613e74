"""ε-stability: |E L(θₜ₊₁) − E L(θₜ)| < ε, with E taken over windows of steps.

The expectation is the mean loss of a window; stage 1 ends when two successive windows differ by
less than ε. Read from Trainer's own log, so that a resumed run decides as an unbroken one.
Source: the stopping rule of stage 1 in arXiv 2410.17875.
"""

from __future__ import annotations

from transformers import TrainerCallback, TrainerState


class StopWhenStable(TrainerCallback):
    """Stops training at ε-stability.

    Args:
        epsilon: ε in nats; 0 never stops.
        window: Steps in a window, ≥ 1.
    """

    def __init__(self, epsilon: float, window: int):
        self.epsilon, self.window = epsilon, window

    def on_log(self, args, state, control, **kwargs):
        if self.stable(state):
            control.should_training_stop = True

    def stable(self, state: TrainerState) -> bool:
        """Whether the last two whole windows differ by less than ε."""
        recent = self._losses(state)[-2 * self.window :]
        if self.epsilon == 0.0 or len(recent) < 2 * self.window:
            return False
        before, after = recent[: self.window], recent[self.window :]
        return abs(sum(after) - sum(before)) / self.window < self.epsilon

    @staticmethod
    def _losses(state: TrainerState) -> list[float]:
        return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]

"""Measure the loss on held-out rows between two steps of a training.

``Trainer`` decides when, and hands the number to its log, its reports and callbacks such as
``EarlyStoppingCallback``. The number is ``held_out_loss``: the mean over answer tokens, with the
lean head, as before and after the training. It draws no random numbers, so that a training with
evaluations makes the same steps as one without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from transformers import Trainer

from ila.data.contracts import Collate, Dataset
from ila.training.loop import held_out_loss


class HeldOutTrainer(Trainer):
    """Evaluate by ``measure``.

    Attributes:
        measure: Returns the loss on the held-out rows.
        whole: Makes a context in which a model with a skipped prefix is whole.
    """

    measure: Callable[[], float] | None = None
    whole: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Measure the loss, log it, and tell the callbacks."""
        if self.measure is None:
            raise ValueError("this trainer has no held-out rows to evaluate on")
        with self.whole(), _as_it_is(self.model):
            metrics = {"eval_loss": self.measure()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def evaluate_on(trainer: HeldOutTrainer, rows: Dataset, collator: Collate, batch_size: int) -> None:
    """Let a trainer measure its evaluations on these rows."""
    trainer.measure = lambda: held_out_loss(trainer.model, rows, collator, batch_size)


def evaluations(trainer: Trainer) -> list[list[float]]:
    """Return [step, loss] of every evaluation, also of resumed parts."""
    history = trainer.state.log_history
    return [[e["step"], float(e["eval_loss"])] for e in history if "eval_loss" in e]


def evaluated(trainer: Trainer, eval_every: int | None) -> Mapping[str, list[list[float]]]:
    """Return the entry of the evaluations for a record; empty for a training without them."""
    return {"evaluations": evaluations(trainer)} if eval_every else {}


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Take off the autocast that accelerate puts around a forward, as before and after training."""
    attributes = vars(model)
    if "_original_forward" not in attributes or "forward" not in attributes:
        yield
        return
    wrapped = attributes["forward"]
    attributes["forward"] = attributes["_original_forward"]
    try:
        yield
    finally:
        attributes["forward"] = wrapped

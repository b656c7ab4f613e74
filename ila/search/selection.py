"""A selection inside one run: its time, its scores, the choice, and the way to close layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ila.data.contracts import Batch, Collate, Dataset
from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.models.edit import CLOSINGS
from ila.models.tensors import record_of_tensors
from ila.price.choice import Choice
from ila.runs.processes import on_main_process
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import LayerMean
from ila.search.in_place import path_scores, shape_of

SCORINGS = ("gate_gradient", "path")


@dataclass(frozen=True)
class Selection:
    """A selection in the middle of a run.

    Attributes:
        choice: Choice of the layers that stay open.
        at: Time of the switch: a share of the steps in (0, 1), or a number of steps.
        closed: ``"keep"`` freezes closed layers in place, ``"drop"`` takes their updates away.
        method: ``"gate_gradient"``, for free, or ``"path"`` on ``batches`` of the run's own data.
        batches: Number of batches for ``path``; 10 to 15 score well.
    """

    choice: Choice
    at: float | int = 0.25
    closed: str = "keep"
    method: str = "gate_gradient"
    batches: int = 12

    def __post_init__(self) -> None:
        at = self.at
        is_in_range = 0 < at < 1 if isinstance(at, float) else at >= 1
        if isinstance(at, bool) or not is_in_range:
            raise ValueError(f"at must be a share in (0, 1) or a number of steps ≥ 1, got {at!r}")
        if self.closed not in CLOSINGS:
            raise ValueError(f"closed must be one of {CLOSINGS}, got {self.closed!r}")
        if self.method not in SCORINGS:
            raise ValueError(f"method must be one of {SCORINGS}, got {self.method!r}")
        if self.batches < 1:
            raise ValueError(f"batches must be ≥ 1, got {self.batches}")

    def as_dict(self) -> dict[str, float | int | str]:
        """Return the fields, with the fields of the choice, for JSON."""
        own = {name: value for name, value in vars(self).items() if name != "choice"}
        return {**self.choice.as_dict(), **own}

    def step(self, steps: int) -> int:
        """Return the number of steps in which all layers train.

        Args:
            steps: Steps of the whole run.

        Raises:
            ValueError: If no step is left before or after the switch.

        >>> Selection(Choice(top=0.3), at=0.25).step(80)
        20
        """
        step = max(1, round(self.at * steps)) if isinstance(self.at, float) else self.at
        if not 1 <= step < steps:
            raise ValueError(
                f"at must leave steps before and after the switch, got {self.at} of {steps}"
            )
        return step

    def choose(
        self,
        updates: AdapterUpdates,
        signal: LayerMean,
        batches: Callable[[int], Sequence[Batch]],
        step: int,
    ) -> LayerMask:
        """Score the layers and choose; every process gets the mask of the main one.

        Args:
            updates: Updates of the layers, every one open.
            signal: Mean over the past steps.
            batches: Makes a number of batches of the run's data, for scores or a budget.
            step: Number of past steps.
        """
        scores, shape = signal.mean(), None
        if self.choice.budget is not None:
            shape = shape_of(updates, batches(1)[0])
        if self.method == "path":
            scores = path_scores(updates, batches(self.batches))
        provenance = {
            "search": {"config": {"method": self.method}},
            "selection": {**self.as_dict(), "step": step},
            "folds": signal.folds() if self.method == "gate_gradient" else [],
            **record_of_tensors(updates.layers),
        }
        mask = self.choice.cut(scores, shape).with_provenance(**provenance)
        fields = on_main_process(
            lambda: (dict(mask.scores), dict(mask.gates), thawed(mask.provenance))
        )
        return LayerMask(*fields)


def drawn_batches(
    dataset: Dataset,
    collator: Collate,
    size: int,
    seed: int,
    device: torch.device,
) -> Callable[[int], list[Batch]]:
    """Return a maker of batches that draws rows by its own seed.

    The order of the training and its random state do not change.
    """

    def make(count: int) -> list[Batch]:
        draw, batches = random.Random(seed), []
        for _ in range(count):
            batch = collator([dataset[draw.randrange(len(dataset))] for _ in range(size)])
            batches.append({k: v.to(device) for k, v in batch.items() if torch.is_tensor(v)})
        return batches

    return make

"""Options of the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ila.runs.settings import check_counts, check_every, check_positive
from ila.training.arguments import check_training_args

STEPS = 400
# Fields that a record has only where they are set: older records do not have them.
_OPTIONAL = ("epochs", "eval_every", "packing", "loraplus_lr_ratio")


@dataclass(frozen=True)
class TrainConfig:
    """Options of the training. Steps are optimiser steps.

    Attributes:
        steps: Number of steps; by default 400, or as many as ``epochs`` take.
        learning_rate: Peak, after 3 % warm-up, then linear decay to 0.
        batch_size: Rows per device and step.
        seed: Seed of data order and dropout.
        save_every: Steps between checkpoints, in an ``output_dir``; None keeps none.
        cache_prefix: Whether to compute the hidden states at the first open block once per row, so
            that forward too skips the frozen blocks. True keeps the states in ``output_dir`` until
            the run is finished; a path keeps them there for other runs.
        cache_limit_gib: Most GiB of states on the disk.
        training_args: Further ``transformers.TrainingArguments`` by name, e.g. ``bf16``; they win
            over Trainer's defaults, but must not set a value that a field here decides.
        epochs: Passes over the rows, in place of ``steps``.
        eval_every: Steps between two measurements of the held-out loss; None measures it only
            before and after the training.
        packing: Whether to put the rows of a batch one after the other, without padding.
        loraplus_lr_ratio: LoRA+: learning rate of B over that of A, which is ``learning_rate``;
            None trains both at one rate.
    """

    steps: int | None = None
    learning_rate: float = 2e-4
    batch_size: int = 8
    seed: int = 0
    save_every: int | None = 50
    cache_prefix: bool | str = False
    cache_limit_gib: float = 20.0
    training_args: Mapping[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    eval_every: int | None = None
    packing: bool = False
    loraplus_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.epochs is None:
            object.__setattr__(self, "steps", STEPS if self.steps is None else self.steps)
            check_counts(self, ("steps",))
        elif self.steps is not None:
            raise ValueError(
                f"give steps or epochs, not both, got steps={self.steps} and epochs={self.epochs}"
            )
        else:
            check_positive(self, ("epochs",))
        check_counts(self, ("batch_size",))
        check_positive(self, ("learning_rate",))
        if self.loraplus_lr_ratio is not None:
            check_positive(self, ("loraplus_lr_ratio",))
        check_every(self, ("save_every", "eval_every"))
        if not self.cache_limit_gib > 0:
            raise ValueError(f"cache_limit_gib must be positive, got {self.cache_limit_gib!r}")
        if self.packing and self.cache_prefix:
            raise ValueError(
                "packing and cache_prefix exclude each other: cached states stand row by row"
            )
        check_training_args(self.training_args, "steps or epochs")

    def for_rows(self, rows: int, processes: int) -> TrainConfig:
        """Return the configuration with ``epochs`` counted in steps, as Trainer counts them.

        Args:
            rows: Rows of the data set.
            processes: Processes that share each step.

        >>> TrainConfig(epochs=2, batch_size=4).for_rows(9, 1).steps
        6
        """
        if self.epochs is None:
            return self
        whole_only = bool(self.training_args.get("dataloader_drop_last"))
        batches = rows // self.batch_size if whole_only else math.ceil(rows / self.batch_size)
        mine = batches // processes if whole_only else math.ceil(batches / processes)
        accumulated = self.training_args.get("gradient_accumulation_steps", 1)
        steps = math.ceil(self.epochs * max(1, math.ceil(mine / accumulated)))
        return replace(self, steps=steps, epochs=None)

    def as_dict(self) -> dict[str, object]:
        """Return the fields, for JSON."""
        fields = {**asdict(self), "training_args": dict(self.training_args)}
        return {name: value for name, value in fields.items() if value or name not in _OPTIONAL}

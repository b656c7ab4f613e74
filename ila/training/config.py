"""Options of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ila.runs.settings import check_counts, check_positive, check_save_every
from ila.training.arguments import check_training_args


@dataclass(frozen=True)
class TrainConfig:
    """Options of the training. Steps are optimiser steps.

    Attributes:
        steps: Number of steps.
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
    """

    steps: int = 400
    learning_rate: float = 2e-4
    batch_size: int = 8
    seed: int = 0
    save_every: int | None = 50
    cache_prefix: bool | str = False
    cache_limit_gib: float = 20.0
    training_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(self, ("steps", "batch_size"))
        check_positive(self, ("learning_rate",))
        check_save_every(self.save_every)
        if not self.cache_limit_gib > 0:
            raise ValueError(f"cache_limit_gib must be positive, got {self.cache_limit_gib!r}")
        check_training_args(self.training_args, "steps")

    def as_dict(self) -> dict[str, object]:
        """Return the fields, for JSON."""
        return {**asdict(self), "training_args": dict(self.training_args)}

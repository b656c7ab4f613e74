"""How the chosen layers are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ila.training.arguments import check_training_args


@dataclass(frozen=True)
class TrainConfig:
    """How the chosen layers are trained. Steps are optimiser steps.

    Attributes:
        steps: Number of steps.
        learning_rate: Peak, after 3 % warm-up, then linear decay to 0.
        batch_size: Rows per device and step.
        seed: Of data order and dropout.
        save_every: Steps between checkpoints; None keeps none. Needs an ``output_dir``.
        cache_prefix: Compute the hidden states at the first open block once per row and train on
            those, so that forward too skips what is frozen below. True keeps them in
            ``output_dir`` until the run is finished; a path keeps them there for other runs.
        cache_limit_gib: Most that they may take on the disk.
        training_args: Further ``transformers.TrainingArguments`` by name, e.g. ``bf16``; they win
            over Trainer's defaults and must not set what a field here decides.
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
        for name in ("steps", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {getattr(self, name)!r}")
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every must be None or ≥ 1, got {self.save_every!r}")
        if not self.cache_limit_gib > 0:
            raise ValueError(f"cache_limit_gib must be positive, got {self.cache_limit_gib!r}")
        check_training_args(self.training_args, "steps")

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**asdict(self), "training_args": dict(self.training_args)}

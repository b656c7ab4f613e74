"""Options of the search, and the methods of scoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ila.runs.settings import check_counts, check_every, check_positive
from ila.search import stage2
from ila.search.baselines import BASELINES
from ila.training.arguments import check_training_args

SEARCHES = ("ila", "path", "gate_gradient")
METHODS = (*SEARCHES, *BASELINES)


@dataclass(frozen=True)
class SearchConfig:
    """Options of the search. Steps are optimiser steps.

    The defaults are a starting point, not a result. ``score_init``, ``score_learning_rate`` and
    ``stage2_steps`` follow the paper; learning rate and steps of stage 1 are usual for LoRA. The
    largest measured model has 135M parameters.

    Attributes:
        method: ``"path"`` averages −dL/dγ along γ = 0.1 … 0.9, without an optimiser; ``"ila"``
            trains the scores (the paper's method); ``"gate_gradient"`` takes the free signal of
            stage 1 and has no stage 2. ``benchmarks.real_data`` compares them. The others are
            cheaper baselines (``ila.search.baselines``).
        stage1_steps: Most steps of stage 1.
        epsilon: Stage 1 ends early when the mean loss of two successive windows of
            ``stability_window`` steps differs by less than this, in nats; 0 turns that off.
        stability_window: Steps in a window.
        learning_rate: Peak learning rate of stage 1; linear decay after 3 % warm-up.
        stage2_steps: Steps of stage 2.
        score_init: Score s₀ that each layer starts with; its gate starts at γ = σ(s₀).
        score_learning_rate: Learning rate of the scores; constant, AdamW without weight decay.
        batch_size: Rows per device and step.
        seed: Seed of data order, dropout and all other random numbers.
        save_every: Steps between checkpoints, in an ``output_dir``; None keeps none.
        training_args: Further ``transformers.TrainingArguments`` by name, e.g. ``bf16``,
            ``gradient_accumulation_steps``; they win over the defaults of stage 1, but must
            not set a value that a field here decides. In stage 2 they cannot change schedule,
            clipping and decay, which would change the scores.
        eval_every: Steps of stage 1 between two measurements of the held-out loss; None measures
            none.
        packing: Whether to put the rows of a batch one after the other, without padding.
        loraplus_lr_ratio: LoRA+ in stage 1: learning rate of B over that of A; None trains both at
            one rate.
    """

    method: str = "path"
    stage1_steps: int = 400
    epsilon: float = 0.01
    stability_window: int = 50
    learning_rate: float = 2e-4
    stage2_steps: int = 128
    score_init: float = 4.0
    score_learning_rate: float = 1e-2
    batch_size: int = 8
    seed: int = 0
    save_every: int | None = 50
    training_args: Mapping[str, Any] = field(default_factory=dict)
    eval_every: int | None = None
    packing: bool = False
    loraplus_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        check_counts(self, ("stage1_steps", "stage2_steps", "batch_size", "stability_window"))
        check_positive(self, ("learning_rate", "score_learning_rate"))
        if self.loraplus_lr_ratio is not None:
            check_positive(self, ("loraplus_lr_ratio",))
        if not 0.0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be ≥ 0, got {self.epsilon!r}")
        if not abs(self.score_init) < 30.0:
            raise ValueError(f"score_init must be in (-30, 30), got {self.score_init!r}")
        if self.method == "path" and self.stage2_steps < len(stage2.PATH_POINTS):
            raise ValueError(
                f"stage2_steps must be ≥ {len(stage2.PATH_POINTS)} for method 'path', one for each "
                f"point of the path, got {self.stage2_steps}"
            )
        check_every(self, ("save_every", "eval_every"))
        check_training_args(self.training_args, "stage1_steps and stage2_steps")

    def as_dict(self) -> dict[str, object]:
        """Return the fields, for JSON; older records lack the last three."""
        fields = {**asdict(self), "training_args": dict(self.training_args)}
        optional = ("eval_every", "packing", "loraplus_lr_ratio")
        return {name: value for name, value in fields.items() if value or name not in optional}

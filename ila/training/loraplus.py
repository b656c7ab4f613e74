"""LoRA+: B learns faster than A by a ratio; PEFT makes the groups of parameters.

Source: Hayou et al., arXiv 2402.12354; ``peft.optimizers.create_loraplus_optimizer``.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments


class _PlusTrainer(Trainer):
    """A ``Trainer`` whose optimiser is LoRA+."""

    ratio: float

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimiser that ``args`` name, over PEFT's groups."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = create_loraplus_optimizer(
                trained,
                kind,
                loraplus_lr_ratio=self.ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
        return self.optimizer


def with_loraplus(kind: type[Trainer], ratio: float | None) -> type[Trainer]:
    """Return the form of ``kind`` that trains with LoRA+; ``kind`` itself without a ratio."""
    if ratio is None:
        return kind
    return type(f"Plus{kind.__name__}", (_PlusTrainer, kind), {"ratio": ratio})


def check_loraplus(ratio: float | None, args: TrainingArguments, model: nn.Module) -> None:
    """Raise if LoRA+ cannot train a model with the optimiser of ``args``.

    Raises:
        ValueError: If the model has no adapter, or the optimiser makes its groups itself.
    """
    if ratio is None:
        return
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"loraplus_lr_ratio={ratio:g} needs a LoRA adapter, and this run trains none"
        )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    own = {"params", "model", "optimizer_dict"} & set(options)
    if own or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(
            f"loraplus_lr_ratio={ratio:g} needs an optimiser that takes groups of parameters; "
            f"{args.optim} makes its own"
        )

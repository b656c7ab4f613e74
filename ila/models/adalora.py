"""``MaskedSvdLinear``: PEFT's AdaLoRA layer as the op of LoRA, and its ranks under a mask.

    y = x Wᵀ + bias + γ c (x̂ (A ⊙ E)ᵀ) Bᵀ        c = scaling / (ranknum + 1e-5)

The op gets c (A ⊙ E), of R x K numbers, in place of A; autograd carries the gradient on to A and
E. PEFT's own code moves the ranks: it scores every triplet and sets the worst of E to 0. It counts
the layers once, when the adapter is made. So a mask lets it count again (``recount``), and it sees
the layers that train alone: a kept layer is a constant and has no gradient to score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel, RankAllocator, SVDLinear
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from ila.models.layer import MaskedLoraLayer, Operands

# PEFT's: it keeps the division finite where a layer has lost every rank.
_EPSILON = 1e-5


class MaskedSvdLinear(MaskedLoraLayer, SVDLinear):
    """An AdaLoRA layer with a gate, a drop-in for ``peft.tuners.adalora.SVDLinear``."""

    peft_class = SVDLinear
    plain = "AdaLoRA on nn.Linear"
    adapter_layer_names = (*AdaLoraLayer.adapter_layer_names, "lora_S")
    _held = "_parameters"

    @staticmethod
    def covers(base: nn.Module) -> bool:
        return type(base) is nn.Linear

    def base_weight(self, base: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        return weight

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A ⊙ E / ranknum (R, K) and B (N, R); the update is ``scaling[adapter] B A``."""
        ranks = self.ranknum[adapter] + _EPSILON
        return self.lora_A[adapter] * (self.lora_E[adapter] / ranks), self.lora_B[adapter]

    def linear_part(self, adapter: str) -> nn.Parameter:
        """Return E: the orthogonal regularisation adds to the gradients of A and B, not to its."""
        return self.lora_E[adapter]

    def _parts_of(self, adapter: str) -> tuple:
        modules = self._modules
        a, b = (modules[name]._parameters[adapter] for name in ("lora_A", "lora_B"))
        return self._fused(adapter, a, b)

    def _operands(self, x: Tensor | None, adapter: str, parts: tuple) -> Operands:
        operands = super()._operands(x, adapter, parts)
        return operands._replace(lora_a=self.factors(adapter)[0])


class _Trained:
    """The trained parameters of a model, in the form in which PEFT's allocator reads a model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


class OpenRanks(RankAllocator):
    """PEFT's allocator of ranks, over the layers that train."""

    def _set_budget_scheduler(self, model: nn.Module) -> None:
        super()._set_budget_scheduler(_Trained(model))

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Score the triplets, and close the worst of them if the schedule asks for it."""
        return super().update_and_allocate(_Trained(model), global_step, force_mask)

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict) -> None:
        """Keep the triplets at 0 that are closed."""
        super().mask_using_rank_pattern(_Trained(model), rank_pattern)


def tuner_of(model: nn.Module) -> AdaLoraModel | None:
    """Return the part of a model that moves ranks; ``None`` where no AdaLoRA adapter trains."""
    tuners = (m for m in model.modules() if isinstance(m, AdaLoraModel))
    return next((tuner for tuner in tuners if hasattr(tuner, "rankallocator")), None)


def open_ranks(model: nn.Module) -> None:
    """Let PEFT's allocator see the layers that train alone."""
    tuner = tuner_of(model)
    if tuner is not None:
        tuner.rankallocator.__class__ = OpenRanks


def close_ranks(model: nn.Module) -> None:
    """Undo ``open_ranks``, with every layer there: PEFT's allocator counts all of them."""
    tuner = tuner_of(model)
    if tuner is not None and isinstance(tuner.rankallocator, OpenRanks):
        tuner.rankallocator.__class__ = RankAllocator
        recount(model, tuner.trainable_adapter_name)


def recount(model: nn.Module, adapter: str) -> None:
    """Share out ranks among the layers that a mask has left: ``target_r`` for each on average."""
    tuner = tuner_of(model)
    if tuner is None or tuner.trainable_adapter_name != adapter:
        return
    tuner.rankallocator._set_budget_scheduler(tuner.model)
    config = tuner.peft_config[adapter]
    if config.rank_pattern is not None:
        known = {_short(name, adapter): ranks for name, ranks in config.rank_pattern.items()}
        config.rank_pattern = {
            name: known.get(_short(name, adapter), [True] * len(p))
            for name, p in tuner.model.named_parameters()
            if f"lora_E.{adapter}" in name
        }


def _short(name: str, adapter: str) -> str:
    return name.replace(f".{adapter}", "")


def set_total_step(model: nn.Module, steps: int) -> None:
    """Set the steps of an adapter's schedule of ranks; nothing for a model without one.

    Raises:
        ValueError: If the schedule leaves no step to move ranks in.
    """
    tuner = tuner_of(model)
    if tuner is None:
        return
    config = tuner.peft_config[tuner.trainable_adapter_name]
    if config.tinit + config.tfinal >= steps:
        raise ValueError(
            f"tinit + tfinal must be below the {steps} steps of the training, got {config.tinit} + "
            f"{config.tfinal}"
        )
    tuner.rankallocator.set_total_step(steps)


@contextmanager
def unregularised(model: nn.Module) -> Iterator[None]:
    """Leave the orthogonal regularisation out of the loss of a model, inside a ``with``."""
    tuner = tuner_of(model)
    config = None if tuner is None else tuner.peft_config[tuner.trainable_adapter_name]
    weight = 0.0 if config is None else config.orth_reg_weight
    try:
        if config is not None:
            config.orth_reg_weight = 0.0
        yield
    finally:
        if config is not None:
            config.orth_reg_weight = weight


@contextmanager
def whole_ranks(config: AdaLoraConfig) -> Iterator[None]:
    """Let PEFT save and load tensors with their closed ranks, inside a ``with``."""
    pattern = config.rank_pattern
    config.rank_pattern = None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def with_closed_ranks(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    pattern: Mapping[str, list[bool]] | None,
) -> dict[str, Tensor]:
    """Return saved weights in the shapes of a model, closed ranks included.

    PEFT writes the open ranks alone. In the closed ones E is 0, and A and B are the model's own.

    Args:
        weights: Tensors of the file.
        own: The model's tensors, by the same names.
        pattern: Open ranks of each layer, of the adapter's configuration.
    """
    made = dict(weights)
    for name, ranks in (pattern or {}).items():
        layer = f"base_model.model.{name.removesuffix('.lora_E')}"
        is_open = torch.tensor(ranks, dtype=torch.bool)
        for part, rank_first in (("lora_A", True), ("lora_E", True), ("lora_B", False)):
            key = f"{layer}.{part}"
            if key not in own or key not in weights:
                continue  # the caller refuses tensors that are missing
            full = own[key].detach().to("cpu", copy=True)
            rows = full if rank_first else full.t()
            rows[is_open] = (weights[key] if rank_first else weights[key].t()).to(full.dtype)
            if part == "lora_E":
                rows[~is_open] = 0.0
            made[key] = full
    return made

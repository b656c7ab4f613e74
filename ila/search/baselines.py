"""Cheap ways to rank layers, to compare the search with: what a method has to beat.

    update_norm     ‖α B A‖_F of the trained adapter
    output_norm     mean over tokens of ‖α B A x‖², of the trained adapter: LoRA-drop, Zhou et al.,
                    arXiv 2402.07721
    gradient_norm   ‖∇W‖_F / ‖W‖_F before training: the relative gradient norm of Lee et al.,
                    "Surgical Fine-Tuning", arXiv 2210.11466
    feature_norm    −mean over tokens of K ‖W x‖² / (‖W‖_F² ‖x‖²) before training, after PLoP, Hayou
                    et al., arXiv 2506.20629, adapts what is least aligned with its input; a random
                    W scores −1
    random, first, middle, last   by a seed, or by place in the model

Scores rank; those of two methods are not in one unit. Norms grow with the size of a layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ila.models.layer import MaskedLoraLayer
from ila.search.gate_gradients import FOLDS, LayerMean
from ila_kernels.quant import PackedWeight

POSITIONS = ("random", "first", "middle", "last")
FORWARD = ("output_norm", "feature_norm")
UNTRAINED = (*POSITIONS, "gradient_norm", "feature_norm")  # need no stage 1
BASELINES = ("update_norm", "output_norm", "gradient_norm", "feature_norm", *POSITIONS)


def by_position(names: Sequence[str], method: str, seed: int) -> dict[str, float]:
    """Scores in (0, 1] that know nothing of model and data; ``names`` in the model's order.

    >>> by_position(["a", "b", "c"], "last", seed=0)
    {'a': 0.3333333333333333, 'b': 0.6666666666666666, 'c': 1.0}
    """
    count = len(names)
    order = list(range(1, count + 1))
    if method == "random":
        random.Random(seed).shuffle(order)
    elif method == "first":
        order.reverse()
    elif method == "middle":
        order = [min(place, count + 1 - place) for place in order]
    elif method != "last":
        raise ValueError(f"method must be one of {POSITIONS}, got {method!r}")
    return {name: place / count for name, place in zip(names, order, strict=True)}


def update_norms(layers: Mapping[str, MaskedLoraLayer], adapter: str) -> dict[str, float]:
    """‖α B A‖_F² = α² tr((A Aᵀ)(Bᵀ B)): two R x R products in fp64, never an N x K one."""
    norms = {}
    for name, layer in layers.items():
        a, b = _adapter(layer, adapter)
        square = ((a @ a.t()) * (b.t() @ b)).sum().clamp(min=0.0)
        norms[name] = abs(layer.scaling[adapter]) * math.sqrt(square.item())
    return norms


class GradientNorm(LayerMean):
    """‖∇W‖_F / ‖W‖_F of each layer, from the gradient of B.

    dB = α ∇W Aᵀ, and E‖∇W Aᵀ‖² = ‖∇W‖² ‖A‖²/K for A (R, K) of independent entries, as PEFT draws
    it: so ‖∇W‖ ≈ ‖dB‖ √K / (α ‖A‖), from R random directions of K, without an N x K gradient.
    """

    def __init__(self, layers: Mapping[str, MaskedLoraLayer], adapter: str):
        super().__init__(layers, adapter)
        refuse_sharded(layers)
        with torch.no_grad():
            self.factors = [self._factor(layer) for layer in layers.values()]

    def _factor(self, layer: MaskedLoraLayer) -> float:
        a, _ = _adapter(layer, self.adapter)
        scale = abs(layer.scaling[self.adapter])
        return math.sqrt(a.shape[1]) / (scale * a.norm().item() * _weight_norm(layer))

    def values(self) -> list[Tensor]:
        gradients = (layer.lora_B[self.adapter].weight.grad for layer in self.layers.values())
        return [
            torch.zeros((), device=self.device) if grad is None else factor * grad.double().norm()
            for grad, factor in zip(gradients, self.factors, strict=True)
        ]


class TokenMean:
    """Sums over tokens of one number per layer, by folds of the batches that run forward."""

    def __init__(self, layers: Mapping[str, MaskedLoraLayer], adapter: str, method: str):
        refuse_sharded(layers)
        self.layers = layers
        device = next(iter(layers.values())).weight.device
        self.totals = torch.zeros(FOLDS, len(layers), dtype=torch.float64, device=device)
        self.tokens = torch.zeros(FOLDS, dtype=torch.float64, device=device)
        self.fold = 0
        self.mask: Tensor | None = None
        make = {"output_norm": _output_square, "feature_norm": _alignment}[method]
        self.measures = [make(layer, adapter) for layer in layers.values()]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch what goes into and comes out of every layer."""
        handles = [
            layer.register_forward_hook(self._hook(place))
            for place, layer in enumerate(self.layers.values())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, mask: Tensor, step: int) -> None:
        """Say which tokens (rows, length) of the next batch are no padding, and its number."""
        self.mask, self.fold = mask.bool(), step % FOLDS
        self.tokens[self.fold] += self.mask.sum()

    def _hook(self, place: int) -> Callable[..., None]:
        def hook(layer, args, y):
            value = self.measures[place](args[0][self.mask], y[self.mask])
            self.totals[self.fold, place] += value.double().sum()

        return hook


def _output_square(layer: MaskedLoraLayer, adapter: str) -> Callable[[Tensor, Tensor], Tensor]:
    """‖α B A x‖² of each token: t (Bᵀ B) tᵀ with t = A x."""
    a, b = _adapter(layer, adapter)
    gram, square = b.t() @ b, layer.scaling[adapter] ** 2

    def measure(x: Tensor, y: Tensor) -> Tensor:
        t = x.to(a.dtype) @ a.t()
        return square * ((t @ gram) * t).sum(-1)

    return measure


def _alignment(layer: MaskedLoraLayer, adapter: str) -> Callable[[Tensor, Tensor], Tensor]:
    """−K ‖W x‖² / (‖W‖² ‖x‖²) of each token, y = W x + bias; 0 where x is 0.

    The adapter must add nothing yet.
    """
    if _adapter(layer, adapter)[1].any():
        raise ValueError(
            "feature_norm scores the base model, but an adapter is trained already: use a fresh one"
        )
    base, norm = layer.get_base_layer(), _weight_norm(layer)

    def measure(x: Tensor, y: Tensor) -> Tensor:
        y = y if base.bias is None else y - base.bias
        out, into = (tensor.double().square().sum(-1) for tensor in (y, x))
        return torch.where(into > 0, out / into, 0.0) * (-x.shape[-1] / norm**2)

    return measure


def _adapter(layer: MaskedLoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (R, K) and B (N, R) in fp64."""
    parts = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    a, b = (part.detach().double() for part in parts)
    return a, b


def _weight_norm(layer: MaskedLoraLayer) -> float:
    base = layer.get_base_layer()
    x = torch.empty(0, base.in_features, dtype=base.weight.dtype, device=base.weight.device)
    if not x.is_floating_point():
        x = x.float()
    weight = layer.base_weight(base, base.weight, x)
    if isinstance(weight, PackedWeight):
        weight = weight.dense(torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()


def refuse_sharded(layers: Mapping[str, MaskedLoraLayer]) -> None:
    """Raise where norms of whole weights cannot be read from what this process holds."""
    if any(hasattr(p, "placements") for layer in layers.values() for p in layer.parameters()):
        raise ValueError(
            "this method reads whole weights, and the model is sharded (FSDP); use method 'path', "
            "'ila' or 'gate_gradient', or load the model again"
        )

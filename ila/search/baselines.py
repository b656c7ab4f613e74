"""Cheap ways to rank layers, as baselines of the search.

    update_norm     ‖α B A‖_F of the trained adapter
    output_norm     mean over tokens of ‖α B A x‖², of the trained adapter: LoRA-drop, Zhou et al.,
                    arXiv 2402.07721
    gradient_norm   ‖∇W‖_F / ‖W‖_F before training: the relative gradient norm of Lee et al.,
                    "Surgical Fine-Tuning", arXiv 2210.11466
    feature_norm    −mean over tokens of K ‖W x‖² / (‖W‖_F² ‖x‖²) before training, after PLoP, Hayou
                    et al., arXiv 2506.20629: the layer least aligned with its input scores
                    highest; a random W scores −1
    snr, snr_overall, kappa   by the singular values of W; ``ila.search.spectra``
    random, first, middle, last   by a seed, or by place in the model

Scores rank; two methods have different units. Norms grow with the size of a layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ila.models.layer import MaskedLoraLayer
from ila.search.gate_gradients import FOLDS, LayerMean
from ila.search.spectra import SPECTRA, whole_weight

POSITIONS = ("random", "first", "middle", "last")
FORWARD = ("output_norm", "feature_norm")
UNTRAINED = (*POSITIONS, *SPECTRA, "gradient_norm", "feature_norm")  # need no stage 1
BASELINES = ("update_norm", "output_norm", "gradient_norm", "feature_norm", *SPECTRA, *POSITIONS)


def by_position(names: Sequence[str], method: str, seed: int) -> dict[str, float]:
    """Return scores in (0, 1] by place alone; ``names`` are in the model's order.

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
    """Return ‖α B A‖_F of each layer.

    ‖α B A‖_F² = α² tr((A Aᵀ)(Bᵀ B)): two R x R products in fp64, and no N x K product. The update
    of a tensor of experts is all of theirs.
    """
    norms = {}
    for name, layer in layers.items():
        a, b = _adapter(layer, adapter)
        square = ((a @ a.mT) * (b.mT @ b)).sum().clamp(min=0.0)
        norms[name] = abs(layer.scaling[adapter]) * math.sqrt(square.item())
    return norms


class GradientNorm(LayerMean):
    """Measure ‖∇W‖_F / ‖W‖_F of each layer from the gradient of B.

    dB = α ∇W Aᵀ, and E‖∇W Aᵀ‖² = ‖∇W‖² ‖A‖²/K if the entries of A (R, K) are independent, as PEFT
    draws them: so ‖∇W‖ ≈ ‖dB‖ √K / (α ‖A‖), from R random directions of K, with no N x K gradient.
    For a tensor of experts ‖∇W‖² is the sum over experts.
    """

    def __init__(self, layers: Mapping[str, MaskedLoraLayer], adapter: str):
        super().__init__(layers, adapter)
        refuse_sharded(layers)
        with torch.no_grad():
            self.factors = [self._factor(layer) for layer in layers.values()]

    def _factor(self, layer: MaskedLoraLayer) -> Tensor:
        a, _ = _adapter(layer, self.adapter)
        scale = abs(layer.scaling[self.adapter])
        return math.sqrt(a.shape[-1]) / (scale * _norms(a) * _weight_norm(layer))

    def values(self) -> list[Tensor]:
        layers = self.layers.values()
        gradients = (layer.lora_B[self.adapter].weight.grad for layer in layers)
        return [
            torch.zeros((), device=self.device)
            if grad is None
            else _whole(factor * _norms(layer.by_expert(grad.double())))
            for layer, grad, factor in zip(layers, gradients, self.factors, strict=True)
        ]


class TokenMean:
    """Sum one number per layer over the tokens of forward batches, in folds of batches."""

    def __init__(self, layers: Mapping[str, MaskedLoraLayer], adapter: str, method: str):
        refuse_sharded(layers)
        self.layers = layers
        device = next(iter(layers.values())).weight.device
        self.totals = torch.zeros(FOLDS, len(layers), dtype=torch.float64, device=device)
        self.tokens = torch.zeros(FOLDS, dtype=torch.float64, device=device)
        self.fold = 0
        self.mask: Tensor | None = None
        make = {"output_norm": _output_square, "feature_norm": _alignment}[method]
        self.per_token = [make(layer, adapter) for layer in layers.values()]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Read the input and the output of every layer, inside a ``with``."""
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
        """Announce the next batch: its mask (rows, length), 0 on padding, and its number."""
        self.mask, self.fold = mask.bool(), step % FOLDS
        self.tokens[self.fold] += self.mask.sum()

    def _hook(self, place: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            value = self.per_token[place](args[0][self.mask], y[self.mask])
            self.totals[self.fold, place] += value.double().sum()

        return hook


def _output_square(layer: MaskedLoraLayer, adapter: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ‖α B A x‖² as a function of tokens: t (Bᵀ B) tᵀ with t = A x."""
    a, b = _adapter(layer, adapter)
    gram, square = b.t() @ b, layer.scaling[adapter] ** 2

    def square_norm(x: Tensor, y: Tensor) -> Tensor:
        t = x.to(a.dtype) @ a.t()
        return square * ((t @ gram) * t).sum(-1)

    return square_norm


def _alignment(layer: MaskedLoraLayer, adapter: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return −K ‖W x‖² / (‖W‖² ‖x‖²) as a function of tokens, y = W x + bias; 0 where x is 0.

    B of the adapter must still be 0.
    """
    if _adapter(layer, adapter)[1].any():
        raise ValueError(
            "feature_norm scores the base model, but an adapter is trained already: use a fresh one"
        )
    base, norm = layer.get_base_layer(), _weight_norm(layer)

    def alignment(x: Tensor, y: Tensor) -> Tensor:
        y = y if base.bias is None else y - base.bias
        out = y.double().square().sum(-1)
        into = x.double().square().sum(-1)
        return torch.where(into > 0, out / into, 0.0) * (-x.shape[-1] / norm**2)

    return alignment


def _norms(matrices: Tensor) -> Tensor:
    """Return ‖·‖_F of a matrix, or of each matrix of a stack."""
    return matrices.norm() if matrices.dim() == 2 else matrices.norm(dim=(1, 2))


def _whole(norms: Tensor) -> Tensor:
    """Return the norm of a stack from the norms of its matrices."""
    return norms if norms.dim() == 0 else norms.norm()


def _adapter(layer: MaskedLoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A (R, K) and B (N, R) in fp64; stacks of them for a tensor of experts."""
    a, b = layer.factors(adapter)
    return a.detach().double(), b.detach().double()


def _weight_norm(layer: MaskedLoraLayer) -> float:
    return torch.linalg.vector_norm(whole_weight(layer), dtype=torch.float64).item()


def refuse_sharded(layers: Mapping[str, MaskedLoraLayer]) -> None:
    """Raise if this process holds parts of weights only; the norms need whole weights."""
    if any(hasattr(p, "placements") for layer in layers.values() for p in layer.parameters()):
        raise ValueError(
            "this method reads whole weights, and the model is sharded (FSDP); use method 'path', "
            "'ila' or 'gate_gradient', or load the model again"
        )

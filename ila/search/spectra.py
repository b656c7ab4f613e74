"""Scores from the singular values of W alone: no data, no gradient, no training.

    snr           the place of the signal-to-noise ratio of W within its kind of layer: Spectrum,
                  Hartford et al., arXiv 2406.06623
    snr_overall   the ratio itself, with all kinds in one ranking
    kappa         −σ₁ / (σ_min + 1e-8): the best conditioned W scores highest. KappaTune,
                  arXiv 2506.16289, in the definition of ``peft.find_kappa_target_modules``

The score of a tensor of experts is the mean over experts, as PEFT's function has it for kappa.
Singular values are computed in float32 at least; a packed W is unpacked for them. PEFT's function
returns names alone, would count the factors of an adapter as layers, and leaves out a W with a side
above 16384: here every layer is scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ila.masks.rules import within_kinds
from ila.models.layer import MaskedLoraLayer
from ila.models.tensors import MaskedTensor
from ila.runs.progress import bar
from ila_kernels.quant import PackedWeight

SPECTRA = ("snr", "snr_overall", "kappa")
_IQR_OF_NORMAL = 1.349  # interquartile range of a normal distribution, in standard deviations
_PEFT_EPSILON = 1e-8


def by_weights(
    layers: Mapping[str, MaskedLoraLayer], method: str, *, progress: bool = False
) -> dict[str, float]:
    """Score every layer by its base weight.

    Args:
        layers: Module name -> layer with a whole weight.
        method: One of ``SPECTRA``.
        progress: Whether to draw a bar.

    Raises:
        ValueError: If the method is another, or a weight has a value that is not finite.
    """
    if method not in SPECTRA:
        raise ValueError(f"method must be one of {SPECTRA}, got {method!r}")
    measure = condition_number if method == "kappa" else signal_to_noise
    scores = {}
    for name, layer in bar(layers.items(), f"Singular values: {method}", show=progress):
        weight = whole_weight(layer)
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight of {name} must be finite, and has other values")
        matrices = weight if weight.dim() == 3 else [weight]
        score = sum(map(measure, matrices)) / len(matrices)
        scores[name] = -score if method == "kappa" else score
    return within_kinds(scores) if method == "snr" else scores


def signal_to_noise(weight: Tensor) -> float:
    """Return (Σ σ above the edge / Σ σ at or below it) / σ₁ of W (N, K).

    The edge is that of the Marchenko–Pastur law, s (1 + √β), with β the shorter side of W over the
    longer one and s = (q₇₅ − q₂₅) / 1.349 from the quartiles of the singular values σ. A noise of
    0 counts as 1, as in Spectrum's own code where no σ is at or below the edge; W = 0 scores 0.
    """
    values = _singular_values(weight)
    if not values[0] > 0:
        return 0.0
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype))
    short, long = sorted(weight.shape)
    spread = (quartiles[1] - quartiles[0]).item() / _IQR_OF_NORMAL
    above = values > spread * (1.0 + math.sqrt(short / long))
    noise = values[~above].sum().item() or 1.0
    return values[above].sum().item() / noise / values[0].item()


def condition_number(weight: Tensor) -> float:
    """Return σ₁ / (σ_min + 1e-8) of W (N, K)."""
    values = _singular_values(weight)
    return (values[0] / (values[-1] + _PEFT_EPSILON)).item()


def whole_weight(layer: MaskedLoraLayer) -> Tensor:
    """Return W (N, K) of a layer's base, dense; a packed one is unpacked to float32.

    Of experts it is their tensor, one W for each.
    """
    if isinstance(layer, MaskedTensor):
        return layer.weight.detach()
    base = layer.get_base_layer()
    x = torch.empty(0, base.in_features, dtype=base.weight.dtype, device=base.weight.device)
    if not x.is_floating_point():
        x = x.float()
    weight = layer.base_weight(base, base.weight, x)
    return (weight.dense(torch.float32) if isinstance(weight, PackedWeight) else weight).detach()


def _singular_values(weight: Tensor) -> Tensor:
    """Return all min(N, K) singular values, the largest first, on the CPU."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.svdvals(wide).cpu()

"""Per-layer signals gathered while ``Trainer`` runs: gate gradients, without a host sync a step.

    ⟨dB, B⟩ = γ dL/dγ

so ordinary LoRA training (γ = 1) measures every gate's gradient for the cost of one inner product
per layer. Importance is −dL/dγ: how fast the loss falls as the layer's update is turned up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import TrainerCallback

from ila.files import write_json_atomic
from ila.layer import MaskedLoraLinear


class LayerMean(TrainerCallback):
    """Mean over optimiser steps of one number per layer; resumable through checkpoints."""

    FILE = "layer_mean.json"

    def __init__(self, layers: Mapping[str, MaskedLoraLinear], adapter: str):
        self.layers, self.adapter = layers, adapter
        self.total: torch.Tensor | None = None
        self.count = 0

    def values(self) -> torch.Tensor:
        """One number per layer from the gradients of this step, shape (layers,)."""
        raise NotImplementedError

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        values = self.values()
        self.total = values if self.total is None else self.total + values
        self.count += 1

    def mean(self) -> dict[str, float]:
        """Module name -> mean; empty before the first step."""
        if self.total is None:
            return {}
        return dict(zip(self.layers, (self.total / self.count).tolist(), strict=True))

    def save(self, folder: Path) -> None:
        """Write the running sums beside a checkpoint."""
        total = None if self.total is None else self.total.tolist()
        write_json_atomic(folder / self.FILE, {"total": total, "count": self.count})

    def load(self, folder: Path) -> None:
        """Read the running sums of a checkpoint."""
        saved = json.loads((folder / self.FILE).read_text(encoding="utf-8"))
        self.count = saved["count"]
        if saved["total"] is not None:
            self.total = torch.tensor(saved["total"], dtype=torch.float64)


class GateGradient(LayerMean):
    """−⟨dB, B⟩ of each layer: the importance that stage 1 gives for free (after clipping)."""

    def values(self) -> torch.Tensor:
        products = []
        for layer in self.layers.values():
            b = layer.lora_B[self.adapter].weight
            inner = b.new_zeros(()) if b.grad is None else (b.grad * b.detach()).sum()
            products.append(-inner)
        return torch.stack(products).to(device="cpu", dtype=torch.float64)


class PathGradient(LayerMean):
    """−dL/dγ of each layer with every gate at the same γ, which walks along ``points``.

    Mean over the points ≈ the integral from γ = 0 to 1, whose sum over the layers is the loss that
    the whole adapter removes: L(0) − L(1) = −Σᵢ ∫ dL/dγᵢ dγ along the diagonal.
    """

    def __init__(
        self, layers: Mapping[str, MaskedLoraLinear], adapter: str, points: tuple[float, ...]
    ):
        super().__init__(layers, adapter)
        self.points = points

    def on_step_begin(self, args, state, control, **kwargs):
        self.gamma = self.points[state.global_step % len(self.points)]
        score = torch.logit(torch.tensor(self.gamma, dtype=torch.float64))
        with torch.no_grad():
            for layer in self.layers.values():
                layer.lora_score[self.adapter].fill_(score.item())

    def values(self) -> torch.Tensor:
        grads = torch.cat([layer.lora_score[self.adapter].grad for layer in self.layers.values()])
        # s = logit γ, so dL/dγ = dL/ds / (γ (1 − γ)).
        slope = self.gamma * (1.0 - self.gamma)
        return -grads.to(device="cpu", dtype=torch.float64) / slope

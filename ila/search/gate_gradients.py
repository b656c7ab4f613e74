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
from transformers import Trainer, TrainerCallback

from ila.models.layer import MaskedLoraLayer
from ila.runs.atomic import write_json_atomic
from ila.runs.processes import stack_whole

FOLDS = 8  # few enough to keep in a mask file, enough for 35 ways to cut them into halves


class LayerMean(TrainerCallback):
    """Mean over optimiser steps of one number per layer; resumable through checkpoints.

    Steps may fall into several groups: the mean of each group then counts alike, however many steps
    it had. Sums stay on the device of the first layer, in fp64. ``SignalTrainer`` calls ``gather``.
    The same is summed by folds of the steps, so that one can tell how well a ranking repeats.
    """

    FILE = "layer_mean.json"
    SUMS = ("totals", "counts", "fold_totals", "fold_counts")

    def __init__(self, layers: Mapping[str, MaskedLoraLayer], adapter: str, groups: int = 1):
        self.layers, self.adapter = layers, adapter
        self.device = next(iter(layers.values())).weight.device
        self.totals = torch.zeros(groups, len(layers), dtype=torch.float64, device=self.device)
        self.counts = torch.zeros(groups, dtype=torch.float64, device=self.device)
        self.fold_totals = self.totals.expand(FOLDS, -1, -1).clone()
        self.fold_counts = self.counts.expand(FOLDS, -1).clone()

    def values(self) -> list[torch.Tensor]:
        """One number per layer from the gradients of this step, of shape ()."""
        raise NotImplementedError

    def group(self, step: int) -> int:
        """The group of a step, by the number of steps before it."""
        return 0

    def gather(self, step: int, loss_scale: float | None = None) -> None:
        """Add the gradients of a step.

        Args:
            step: Steps before it.
            loss_scale: What fp16 training multiplies the loss by; a step that overflowed, which the
                optimiser skips, is then not counted. None where there is no such scaling.
        """
        group = self.group(step)
        values = [value.to(torch.float64) for value in self.values()]
        found = stack_whole(values).to(self.device)
        counted = torch.ones((), dtype=torch.float64, device=self.device)
        if loss_scale is not None:
            counted = found.isfinite().all().to(torch.float64)
            found = torch.where(counted.bool(), found / loss_scale, 0.0)
        self.totals[group] += found
        self.counts[group] += counted
        fold = step // len(self.counts) % FOLDS
        self.fold_totals[fold, group] += found
        self.fold_counts[fold, group] += counted

    def mean(self) -> dict[str, float]:
        """Module name -> mean; empty before the first step."""
        seen = self.counts > 0
        if not seen.any():
            return {}
        means = (self.totals[seen] / self.counts[seen, None]).mean(0)
        return dict(zip(self.layers, means.tolist(), strict=True))

    def folds(self) -> list[list[float]]:
        """Means over disjoint parts of the steps, in the order of the layers.

        At most ``FOLDS`` of them; a part that lacks a step of some group is left out.
        """
        full = (self.fold_counts > 0).all(1)
        means = self.fold_totals[full] / self.fold_counts[full, :, None]
        return means.mean(1).tolist()

    def sums(self) -> dict[str, list]:
        """Return the running sums, for JSON."""
        return {name: getattr(self, name).tolist() for name in self.SUMS}

    def set_sums(self, sums: Mapping[str, list]) -> None:
        """Go on from what ``sums`` returned."""
        for name in self.SUMS:
            getattr(self, name).copy_(torch.tensor(sums[name], dtype=torch.float64))

    def save(self, folder: Path) -> None:
        """Write the running sums beside a checkpoint."""
        write_json_atomic(folder / self.FILE, self.sums())

    def load(self, folder: Path) -> None:
        """Read the running sums of a checkpoint."""
        self.set_sums(json.loads((folder / self.FILE).read_text(encoding="utf-8")))


class SignalTrainer(Trainer):
    """Trainer that lets a ``LayerMean`` read the gradients of each optimiser step, unclipped."""

    signal: LayerMean | None = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        self.finish_gradients()
        # Accumulation is over, and Trainer's clipping, which would weigh steps unlike, comes next.
        if self.signal is not None:
            scaler = self.accelerator.scaler
            self.signal.gather(self.state.global_step, scaler and scaler.get_scale())
        return loss

    def finish_gradients(self) -> None:
        """Complete the gradients of an optimiser step; nothing is left to do here."""


class GateGradient(LayerMean):
    """−⟨dB, B⟩ of each layer: the importance that stage 1 gives for free."""

    def values(self) -> list[torch.Tensor]:
        return [self._product(layer) for layer in self.layers.values()]

    def _product(self, layer: MaskedLoraLayer) -> torch.Tensor:
        if self.adapter not in layer.lora_B:  # closed by a mask
            return torch.zeros((), device=self.device)
        b = layer.lora_B[self.adapter].weight
        gradient = torch.zeros_like(b) if b.grad is None else b.grad
        return -(gradient * b.detach()).sum()


class PathGradient(LayerMean):
    """−dL/dγ of each layer with every gate at the same γ, which walks along ``points``.

    Mean over the points ≈ the integral from γ = 0 to 1, whose sum over the layers is the loss that
    the whole adapter removes: L(0) − L(1) = −Σᵢ ∫ dL/dγᵢ dγ along the diagonal.
    """

    def __init__(
        self, layers: Mapping[str, MaskedLoraLayer], adapter: str, points: tuple[float, ...]
    ):
        super().__init__(layers, adapter, groups=len(points))
        self.points = points

    def group(self, step: int) -> int:
        return step % len(self.points)

    def on_step_begin(self, args, state, control, **kwargs):
        self.set_gates(state.global_step)

    def set_gates(self, step: int) -> None:
        """Set every gate to the point of this step."""
        self.gamma = self.points[self.group(step)]
        score = torch.logit(torch.tensor(self.gamma, dtype=torch.float64)).item()
        with torch.no_grad():
            for layer in self.layers.values():
                layer.lora_S[self.adapter].fill_(score)

    def values(self) -> list[torch.Tensor]:
        # s = logit γ, so dL/dγ = dL/ds / (γ (1 − γ)).
        slope = self.gamma * (1.0 - self.gamma)
        scores = (layer.lora_S[self.adapter] for layer in self.layers.values())
        return [
            # A layer that the model never calls removes nothing of the loss.
            torch.zeros((), device=self.device)
            if score.grad is None
            else score.grad.double().reshape(()) / -slope
            for score in scores
        ]

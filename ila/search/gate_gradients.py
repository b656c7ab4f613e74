"""Measure gate gradients while ``Trainer`` runs, without a host sync at each step.

    ⟨dB, B⟩ = γ dL/dγ

Ordinary LoRA training (γ = 1) thus measures every gate's gradient for one inner product per layer.
Importance is −dL/dγ: how fast the loss falls as the layer's update grows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ila.models.layer import MaskedLoraLayer
from ila.runs.atomic import write_json_atomic
from ila.runs.processes import stack_whole
from ila.training.evaluation import HeldOutTrainer

FOLDS = 8  # few enough to keep in a mask file, enough for 35 ways to cut them into halves


class LayerMean(TrainerCallback):
    """Average one number per layer over optimiser steps; checkpoints keep the sums.

    Steps may fall into several groups; the mean of each group then counts alike. Sums stay on the
    device of the first layer, in fp64. ``SignalTrainer`` calls ``gather``. Further sums over folds
    of the steps tell how well a ranking repeats.
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
        """Return one number per layer, of shape (), from the gradients of this step."""
        raise NotImplementedError

    def group(self, step: int) -> int:
        """Return the group of a step, given the number of steps before it."""
        return 0

    def gather(self, step: int, loss_scale: float | None = None) -> None:
        """Add the gradients of a step.

        Args:
            step: Number of steps before it.
            loss_scale: Factor of the loss in fp16 training; the sums then leave out a step that
                overflowed, which the optimiser skips. None without such scaling.
        """
        group = self.group(step)
        values = [value.to(torch.float64) for value in self.values()]
        stacked = stack_whole(values).to(self.device)
        counted = torch.ones((), dtype=torch.float64, device=self.device)
        if loss_scale is not None:
            counted = stacked.isfinite().all().to(torch.float64)
            stacked = torch.where(counted.bool(), stacked / loss_scale, 0.0)
        self.totals[group] += stacked
        self.counts[group] += counted
        fold = step // len(self.counts) % FOLDS
        self.fold_totals[fold, group] += stacked
        self.fold_counts[fold, group] += counted

    def mean(self) -> dict[str, float]:
        """Return module name -> mean; empty before the first step."""
        seen = self.counts > 0
        if not seen.any():
            return {}
        means = (self.totals[seen] / self.counts[seen, None]).mean(0)
        return dict(zip(self.layers, means.tolist(), strict=True))

    def folds(self) -> list[list[float]]:
        """Return means over disjoint parts of the steps, in the order of the layers.

        There are at most ``FOLDS`` parts; a part without a step of some group is left out.
        """
        full = (self.fold_counts > 0).all(1)
        means = self.fold_totals[full] / self.fold_counts[full, :, None]
        return means.mean(1).tolist()

    def sums(self) -> dict[str, list]:
        """Return the running sums, for JSON."""
        return {name: getattr(self, name).tolist() for name in self.SUMS}

    def set_sums(self, sums: Mapping[str, list]) -> None:
        """Continue from the result of ``sums``."""
        for name in self.SUMS:
            getattr(self, name).copy_(torch.tensor(sums[name], dtype=torch.float64))

    def save(self, folder: Path) -> None:
        """Write the running sums beside a checkpoint."""
        write_json_atomic(folder / self.FILE, self.sums())

    def load(self, folder: Path) -> None:
        """Read the running sums of a checkpoint."""
        self.set_sums(json.loads((folder / self.FILE).read_text(encoding="utf-8")))


class SignalTrainer(HeldOutTrainer):
    """Let a ``LayerMean`` read the unclipped gradients of each optimiser step."""

    signal: LayerMean | None = None

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Run a step, and gather its gradients when accumulation is over."""
        loss = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        self.finish_gradients()
        # Before Trainer clips the gradients, which would give steps different weights.
        if self.signal is not None:
            scaler = self.accelerator.scaler
            self.signal.gather(self.state.global_step, scaler and scaler.get_scale())
        return loss

    def finish_gradients(self) -> None:
        """Complete the gradients of an optimiser step; a subclass may have to."""


class GateGradient(LayerMean):
    """Measure −⟨dB, B⟩ of each layer: the importance that stage 1 gives for free.

    AdaLoRA's is −⟨dE, E⟩.
    """

    def values(self) -> list[torch.Tensor]:
        """Return −⟨dB, B⟩ of each layer."""
        return [self._product(layer) for layer in self.layers.values()]

    def _product(self, layer: MaskedLoraLayer) -> torch.Tensor:
        if self.adapter not in layer.lora_B:  # closed by a mask
            return torch.zeros((), device=self.device)
        part = layer.linear_part(self.adapter)
        gradient = torch.zeros_like(part) if part.grad is None else part.grad
        return -(gradient * part.detach()).sum()


class PathGradient(LayerMean):
    """Measure −dL/dγ of each layer, with all gates at the same γ, which walks along ``points``.

    The mean over the points ≈ the integral from γ = 0 to 1. Its sum over layers is the loss that
    the whole adapter removes: L(0) − L(1) = −Σᵢ ∫ dL/dγᵢ dγ along the diagonal.
    """

    def __init__(
        self, layers: Mapping[str, MaskedLoraLayer], adapter: str, points: tuple[float, ...]
    ):
        super().__init__(layers, adapter, groups=len(points))
        self.points = points

    def group(self, step: int) -> int:
        """Return the point of a step."""
        return step % len(self.points)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Set all gates to the point of this step."""
        self.set_gates(state.global_step)

    def set_gates(self, step: int) -> None:
        """Set every gate to the point of this step."""
        self.gamma = self.points[self.group(step)]
        score = torch.logit(torch.tensor(self.gamma, dtype=torch.float64)).item()
        with torch.no_grad():
            for layer in self.layers.values():
                layer.lora_S[self.adapter].fill_(score)

    def values(self) -> list[torch.Tensor]:
        """Return −dL/dγ of each layer."""
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

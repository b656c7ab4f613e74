"""Gates on the updates of layers trained in full: W_γ = W₀ + γ (W − W₀), and bias likewise.

    dγ = ⟨dW_γ, W − W₀⟩        at γ = 1, free in training: ⟨dW, W − W₀⟩

Autograd computes it, one dW_γ (N, K) at a time: there is no low-rank product to fuse.
W₀ stays beside W in the dtype of the base. While the scores train, a weight of a bf16 base costs
W₀ 2 bytes, W 4, a float32 copy of W₀ 4 and W_γ 2; in stage 1 it cost W₀ 2, W 4, gradient 4 and
AdamW's moments 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from ila.masks.names import PEFT_PREFIX
from ila.models.open_weights import (
    CHANGED_FILE,
    OpenLayers,
    OpenLinear,
    OpenTrainer,
    load_changed,
)
from ila.runs.metrics import LayerCounts
from ila.search import stage2
from ila.search.gate_gradients import LayerMean, SignalTrainer

_SCORE = "full"  # name of the score in a layer, in place of the name of an adapter


class GatedLinear(OpenLinear):
    """An ``OpenLinear`` that scales its update by γ = σ(s); x (..., K) -> y (..., N)."""

    start: Mapping[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W_γᵀ + b_γ."""
        gate = torch.sigmoid(self.lora_S[_SCORE])
        weight = self._gated("weight", gate, x.dtype)
        return F.linear(x, weight, self._gated("bias", gate, x.dtype))

    def _gated(self, name: str, gate: Tensor, dtype: torch.dtype) -> Tensor | None:
        trained = getattr(self, name)
        if trained is None:
            return None
        start = self.start[name].to(trained.device, trained.dtype)
        # lerp and not a sum: exactly W₀ at γ = 0 and W at γ = 1.
        return torch.lerp(start, trained, gate.to(trained.dtype)).to(dtype)


class WeightUpdates:
    """Updates ΔW = W − W₀ of layers whose own weights train.

    Args:
        opened: Result of ``ila.models.open_weights.open_layers`` with every layer open. W₀ are
            the weights of now.

    Raises:
        ValueError: If a layer is closed.
    """

    adapter = _SCORE
    folder, label = "changed", "weights"

    def __init__(self, opened: OpenLayers):
        if len(opened.names) != opened.total:
            raise ValueError(
                f"{opened.total - len(opened.names)} of {opened.total} layers are closed; the "
                "search needs every layer open"
            )
        self.opened, self.model = opened, opened.model
        self.layers = {PEFT_PREFIX + n: self.model.get_submodule(n) for n in opened.names}
        self.start = {
            name: {
                key: _kept(parameter, opened.dtypes[f"{name.removeprefix(PEFT_PREFIX)}.{key}"])
                for key, parameter in layer.named_parameters(recurse=False)
            }
            for name, layer in self.layers.items()
        }

    def signal(self) -> LayerMean:
        """Return the importance that stage 1 measures at no extra step."""
        return UpdateGradient(self.layers, self.start)

    def counts(self) -> LayerCounts:
        """Return how many layers are open and how many parameters are trained."""
        return self.opened.counts()

    def trainer_class(self, kind: type[Trainer] = Trainer) -> type[Trainer]:
        """Return the form of ``kind`` whose checkpoints hold the trained weights alone."""
        forms = {SignalTrainer: _OpenSignalTrainer, stage2.ScoreTrainer: _OpenScoreTrainer}
        return forms.get(kind, OpenTrainer)

    @contextmanager
    def scored(self, score_init: float) -> Iterator[None]:
        """Give every layer a gate and freeze all else; undo both on leaving."""
        for name, layer in self.layers.items():
            layer.__class__ = GatedLinear
            layer.start, layer.lora_S = self.start[name], nn.ParameterDict()
        try:
            with stage2.scored(self.model, self.layers, _SCORE, score_init):
                yield
        finally:
            for layer in self.layers.values():
                del layer.start, layer.lora_S
                layer.__class__ = OpenLinear

    def state(self) -> dict[str, Tensor]:
        """Return the trained weights, not rounded to the base: stage 2 starts from them."""
        names = self.opened.dtypes
        return {n: self.model.get_parameter(n).detach().cpu().contiguous() for n in names}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the result of ``state``."""
        save_file(state, folder / CHANGED_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read a folder that ``save`` wrote."""
        load_changed(self.model, folder)


def _kept(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a parameter in the dtype of the base, or in its own dtype if that would round it."""
    small = parameter.detach().to(dtype, copy=True)
    return small if small.to(parameter.dtype).equal(parameter) else parameter.detach().clone()


class UpdateGradient(LayerMean):
    """Measure −⟨dW, W − W₀⟩ of each layer, with bias: −dL/dγ at γ = 1, free in training."""

    def __init__(self, layers: Mapping[str, nn.Module], start: Mapping[str, Mapping[str, Tensor]]):
        super().__init__(layers, _SCORE)
        self.start = start

    def values(self) -> list[Tensor]:
        """Return −⟨dW, W − W₀⟩ of each layer."""
        return [self._value(layer, self.start[name]) for name, layer in self.layers.items()]

    def _value(self, layer: nn.Module, start: Mapping[str, Tensor]) -> Tensor:
        parts: list[Tensor] = [
            (p.grad * (p.detach() - start[key].to(p.device))).sum()
            for key, p in layer.named_parameters(recurse=False)
            if p.grad is not None
        ]
        return -sum(parts, layer.weight.new_zeros(()))


class _OpenSignalTrainer(OpenTrainer, SignalTrainer):
    """Trainer of stage 1."""


class _OpenScoreTrainer(OpenTrainer, stage2.ScoreTrainer):
    """Trainer of stage 2."""

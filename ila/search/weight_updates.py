"""Gates on the updates of layers trained in full: W_γ = W₀ + γ (W − W₀), and bias likewise.

    dγ = ⟨dW_γ, W − W₀⟩        at γ = 1, free in training: ⟨dW, W − W₀⟩

Autograd does it, one dW_γ (N, K) at a time: no op of ours is needed, because there is no low-rank
product to fuse. W₀ is kept beside W in the dtype of the base. While the scores are learned a weight
of a bf16 base costs W₀ 2 bytes, W 4, a float32 copy of W₀ 4 and W_γ 2; training it before that cost
W₀ 2, W 4, gradient 4 and AdamW's moments 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from ila.models.open_weights import (
    CHANGED_FILE,
    PEFT_PREFIX,
    OpenLayers,
    OpenLinear,
    OpenTrainer,
    load_changed,
)
from ila.runs.metrics import LayerCounts
from ila.search import stage2
from ila.search.gate_gradients import LayerMean, SignalTrainer

_SCORE = "full"  # the name under which a layer keeps its score, as adapters do under theirs


class GatedLinear(OpenLinear):
    """An ``OpenLinear`` whose update counts γ = σ(s) times; x (..., K) -> y (..., N)."""

    start: Mapping[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.lora_S[_SCORE])
        weight, bias = (self._gated(name, gate, x.dtype) for name in ("weight", "bias"))
        return F.linear(x, weight, bias)

    def _gated(self, name: str, gate: Tensor, dtype: torch.dtype) -> Tensor | None:
        trained = self._parameters[name]
        if trained is None:
            return None
        start = self.start[name].to(trained.device, trained.dtype)
        # lerp and not a sum: exactly W₀ at γ = 0 and W at γ = 1.
        return torch.lerp(start, trained, gate.to(trained.dtype)).to(dtype)


class WeightUpdates:
    """What a search scores if the layers' own weights are trained: ΔW = W − W₀ of each.

    Args:
        opened: From ``ila.models.open_weights.open_layers``, every layer open. W₀ is
            what its weights are now.

    Raises:
        ValueError: If not every layer is open.
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
        """Return the importance that stage 1 measures for free."""
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
        """The trained weights as they are, not rounded to the base: stage 2 goes on from them."""
        names = self.opened.dtypes
        return {n: self.model.get_parameter(n).detach().cpu().contiguous() for n in names}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write what ``state`` returned."""
        save_file(state, folder / CHANGED_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""
        load_changed(self.model, folder)


def _kept(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the dtype of the base, or in the parameter's own if that would round it."""
    small = parameter.detach().to(dtype, copy=True)
    return small if small.to(parameter.dtype).equal(parameter) else parameter.detach().clone()


class UpdateGradient(LayerMean):
    """−⟨dW, W − W₀⟩ of each layer, bias included: −dL/dγ at γ = 1, from training's gradients."""

    def __init__(self, layers: Mapping[str, nn.Module], start: Mapping[str, Mapping[str, Tensor]]):
        super().__init__(layers, _SCORE)
        self.start = start

    def values(self) -> list[Tensor]:
        return [self._value(layer, self.start[name]) for name, layer in self.layers.items()]

    def _value(self, layer: nn.Module, start: Mapping[str, Tensor]) -> Tensor:
        parts: list[Any] = [
            (p.grad * (p.detach() - start[key].to(p.device))).sum()
            for key, p in layer.named_parameters(recurse=False)
            if p.grad is not None
        ]
        return -sum(parts, layer.weight.new_zeros(()))


class _OpenSignalTrainer(OpenTrainer, SignalTrainer):
    """Stage 1."""


class _OpenScoreTrainer(OpenTrainer, stage2.ScoreTrainer):
    """Stage 2."""

"""Score the updates α B A of an adapter, one for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from peft import PeftModel

from ila.models.edit import masked_layers
from ila.models.layer import MaskedLoraLayer
from ila.search import stage2
from ila.search.gate_gradients import GateGradient, LayerMean
from ila.training.adapter import Adapter


class AdapterUpdates(Adapter):
    """Updates of an adapter; ``ila.search.weight_updates.WeightUpdates`` has the same methods.

    Raises:
        ValueError: If the model has no layer to score, or a layer is closed or not on the fused
            path.
    """

    folder, label = "adapter", "LoRA"

    def __init__(self, model: PeftModel):
        super().__init__(model)
        self.layers = masked_layers(model, self.adapter)
        _check_layers(self.layers, self.adapter)

    def signal(self) -> LayerMean:
        """Return the gate gradient, which stage 1 measures at no extra step."""
        return GateGradient(self.layers, self.adapter)

    def scored(self, score_init: float) -> AbstractContextManager[None]:
        """Give every layer a gate and freeze all else, inside a ``with``."""
        return stage2.scored(self.model, self.layers, self.adapter, score_init)


def _check_layers(layers: Mapping[str, MaskedLoraLayer], adapter: str) -> None:
    if not layers:
        raise ValueError(
            f"peft_model has no MaskedLoraLinear layer with adapter {adapter!r}; "
            "use ila.attach or ila.convert first"
        )
    for name, layer in layers.items():
        if not layer.is_open(adapter):
            raise ValueError(f"layer {name!r} is closed; the search needs every layer open")
        reason = layer.why_not_scored()
        if reason is not None:
            raise ValueError(f"layer {name!r} cannot be scored: {reason}")

"""Merge an adapter into its base, where layers may share a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel


def merge(peft_model: PeftModel) -> PreTrainedModel:
    """Merge an adapter into its base model, in place.

    A weight that an adapted layer shares with another module, as an output layer does with the
    embedding, becomes the layer's own first: merged into both, it would change both.

    Returns:
        The base model, without adapters; its configuration says so if it was untied.
    """
    model = peft_model.get_base_model()
    if untie(peft_model):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return peft_model.merge_and_unload(safe_merge=True)


def untie(model: nn.Module) -> list[str]:
    """Give every adapted layer a weight of its own; return the names of layers that shared one."""
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "base_layer", module)._parameters.get("weight")
        if isinstance(module, BaseTunerLayer) and holders.get(id(weight), 0) > 1:
            holders[id(weight)] -= 1
            own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            module.get_base_layer().weight = own
            found.append(name)
    return found


def check_same_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path
) -> None:
    """Refuse an adapter that lacks tensors of the model: PEFT would leave those as they are."""
    for name, tensor in expected.items():
        if name not in found or found[name].shape != tensor.shape:
            has = tuple(found[name].shape) if name in found else "nothing"
            raise ValueError(
                f"the adapter in {folder} is damaged, or of another model: {name} must have shape "
                f"{tuple(tensor.shape)}, got {has}"
            )

"""Families of causal language models whose forward is known: decoder, head, a map, the loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    ModelOutput,
    MoeCausalLMOutputWithPast,
)

from ila.models.lean_loss import LogitMap


def _as_it_is(model: nn.Module) -> LogitMap:
    return LogitMap()


def _capped(model: nn.Module) -> LogitMap:
    return LogitMap(cap=model.config.final_logit_softcapping)


def _divided(model: nn.Module) -> LogitMap:
    return LogitMap(scale=1.0 / model.config.logits_scaling)


def _multiplied(model: nn.Module) -> LogitMap:
    return LogitMap(scale=model.logit_scale)


# Classes whose forward is: ``self.model``, ``self.lm_head``, this map of the logits, the loss.
_DENSE = (
    *("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "Gemma", "Phi", "Phi3", "Olmo", "Olmo2"),
    *("Olmo3", "SmolLM3", "StableLm", "Starcoder2", "Helium", "Glm", "Glm4", "Arcee", "Nemotron"),
)
_EXPERTS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")
_MAPS: dict[str, Callable[[nn.Module], LogitMap]] = {
    **dict.fromkeys((*_DENSE, *_EXPERTS), _as_it_is),
    **dict.fromkeys(("Gemma2", "Gemma3"), _capped),
    "Granite": _divided,
    **dict.fromkeys(("Cohere", "Cohere2"), _multiplied),
}
_SUFFIX = "ForCausalLM"


def family_of(model: nn.Module) -> str | None:
    """Name the family of a model by the class whose forward runs; None where it is not known."""
    owner = next(kind for kind in type(model).__mro__ if "forward" in kind.__dict__)
    family = owner.__name__.removesuffix(_SUFFIX)
    ours = owner.__module__.startswith("transformers.") and owner.__name__.endswith(_SUFFIX)
    return family if ours and family in _MAPS else None


def logit_map(model: nn.Module) -> LogitMap:
    """Give the map that a model of a known family applies to the logits of its head."""
    return _MAPS[family_of(model)](model)


def output_class(model: nn.Module) -> type[ModelOutput]:
    """Give the class of the outputs of a model's forward."""
    return MoeCausalLMOutputWithPast if family_of(model) in _EXPERTS else CausalLMOutputWithPast

"""Models at true size without data: built on the meta device, adapted, masked, made fake."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import ila
from ila.models.layer import MaskedLoraLayer

_COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: dict[str, tuple[type, type, dict[str, int]]] = {
    "llama-2-7b": (
        LlamaConfig,
        LlamaForCausalLM,
        {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    ),
    "llama-3-8b": (
        LlamaConfig,
        LlamaForCausalLM,
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "mistral-7b": (
        MistralConfig,
        MistralForCausalLM,
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32768},
    ),
}
RANK, OPEN = 16, 0.3


def build(name: str, layers: int | None = None) -> nn.Module:
    """The model in bf16 on the meta device, frozen, in training mode."""
    config_class, model_class, shape = SHAPES[name]
    shape = _COMMON | shape | ({} if layers is None else {"num_hidden_layers": layers})
    config = config_class(**shape, use_cache=False, sliding_window=None)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return model_class(config).to(torch.bfloat16).requires_grad_(False).train()


def adapted(
    base: nn.Module, dropout: float = 0.0, bf16: bool = False, empty: bool = True
) -> nn.Module:
    """PEFT's model: rank 16 on all linear layers, adapters in fp32 unless ``bf16``.

    ``empty``: the adapters are on the meta device, where the base should be.
    """
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config, low_cpu_mem_usage=empty)
    return in_dtype(model, torch.bfloat16 if bf16 else torch.float32)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the adapters a dtype, in place."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def converted(model: nn.Module) -> nn.Module:
    """Ours, in place, with the head that ``ila train`` gives it."""
    ila.convert(model)
    ila.lean_head(model)
    return model


def masked(model: nn.Module, rank_of: Callable[[int], float], share: float = OPEN) -> nn.Module:
    """Close all but the share of layers that ``rank_of`` their position from the input favours."""
    names = [n for n, m in model.named_modules() if isinstance(m, MaskedLoraLayer)]
    scores = {name: rank_of(position) for position, name in enumerate(names)}
    ila.apply_mask(model, ila.LayerMask(scores, dict.fromkeys(names, True)).top(share))
    return model


def at_random(seed: int) -> Callable[[int], float]:
    """A rank for each position, drawn in the order of the positions."""
    generator = random.Random(seed)
    return lambda position: generator.random()


def fake(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Replace every meta tensor by a fake one; call it inside a ``FakeTensorMode``."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                store[name] = made[id(tensor)]
    return model

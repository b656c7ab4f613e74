"""Bytes that one block keeps for backward, at true sizes, counted on fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

import ila
from benchmarks.memory.true_size import adapted
from benchmarks.saved_bytes import count
from ila.models.attention import unfuse_qkv
from ila.models.mlp import make_plain

ROWS, TOKENS = 4, 1024
# Model -> prefix of its classes in transformers, and the sizes of its configuration.
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "Qwen3-8B": (
        "Qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "OLMo-2-7B": (
        "Olmo2",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "Gemma-3-4B": (
        "Gemma3",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
        },
    ),
}


def _layers_alone(model: nn.Module) -> nn.Module:
    ila.convert(model)
    make_plain(model)
    unfuse_qkv(model)
    return model


def _ours(model: nn.Module) -> nn.Module:
    ila.convert(model)
    return model


CONTESTANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "PEFT": adapted,
    "this library, blocks of transformers": lambda base: _layers_alone(adapted(base)),
    "this library": lambda base: _ours(adapted(base)),
}


def build(name: str, blocks: int) -> nn.Module:
    """Return the model in bf16 on the meta device, with this many blocks and a small vocabulary."""
    prefix, shape = SHAPES[name]
    text = getattr(transformers, f"{prefix}TextConfig", None)
    kind = text or getattr(transformers, f"{prefix}Config")
    small = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = kind(**shape, **small, num_hidden_layers=blocks, use_cache=False)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        return model.to(torch.bfloat16).requires_grad_(False).train()


def of_one_block(name: str, contestant: str) -> int:
    """Return what three blocks keep beyond two: a block inside the model."""
    totals = [
        sum(count(CONTESTANTS[contestant](build(name, blocks)), ROWS, TOKENS).values())
        for blocks in (2, 3)
    ]
    return totals[1] - totals[0]

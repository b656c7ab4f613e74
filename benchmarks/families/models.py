"""A tiny random model of each family, without dropout, in fp64."""

from __future__ import annotations

import torch
import transformers
from torch import nn

BLOCKS, VOCABULARY = 3, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_GEMMA = _HEAD | {"query_pre_attn_scalar": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
_LATENT |= {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 4}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_SLIDING = {"sliding_window": 16}

# Name of the family -> prefix of its classes in transformers, and its own options.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {}),
    "Ministral": ("Ministral", _HEAD | _SLIDING),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", _HEAD),
    "SmolLM3": ("SmolLM3", {}),
    "Gemma": ("Gemma", _HEAD),
    "Gemma 2": ("Gemma2", _GEMMA | _SLIDING),
    "Gemma 3 (text)": ("Gemma3", _GEMMA | _SLIDING),
    "OLMo": ("Olmo", {}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", _SLIDING),
    "Granite": ("Granite", {}),
    "ERNIE 4.5": ("Ernie4_5", _HEAD),
    "EXAONE 4": ("Exaone4", _SLIDING),
    "Seed-OSS": ("SeedOss", _HEAD | {"residual_dropout": 0.0, "attention_dropout": 0.0}),
    "HunYuan (dense)": ("HunYuanDenseV1", _HEAD),
    "Arcee": ("Arcee", {}),
    "Helium": ("Helium", _HEAD),
    "Cohere": ("Cohere", {}),
    "Cohere 2": ("Cohere2", _SLIDING),
    "GLM": ("Glm", _HEAD),
    "GLM-4": ("Glm4", _HEAD),
    "StableLM": ("StableLm", {}),
    "Nemotron": ("Nemotron", _HEAD),
    "StarCoder2": ("Starcoder2", {}),
    "Phi": ("Phi", {}),
    "Phi-3": ("Phi3", {}),
    "Falcon": ("Falcon", {}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "GPT-2": ("GPT2", _NO_DROPOUT),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": ("Qwen3Moe", _HEAD | _EXPERTS | {"num_experts": 4}),
    "DeepSeek-V3": ("DeepseekV3", _LATENT | _EXPERTS),
}


def build(family: str) -> nn.Module:
    """Return a random model, large enough weights that attention is not uniform."""
    prefix, own = FAMILIES[family]
    text = getattr(transformers, f"{prefix}TextConfig", None)
    config = (text or getattr(transformers, f"{prefix}Config"))(**SIZES | own)
    config._experts_implementation = "eager"  # the fused ones have no fp64
    names = (f"{prefix}ForCausalLM", f"{prefix}LMHeadModel")
    kind = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(config).double()

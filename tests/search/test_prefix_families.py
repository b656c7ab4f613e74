"""The prefix cache over other families: exact, or refused with the reason."""

import pytest
from peft import LoraConfig
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import ila
from ila.models.blocks import find_blocks
from ila.prefix.cache import PrefixCache
from ila.training.loop import default_collator

ROWS = [{"input_ids": [3 + i] * (4 + 6 * i), "labels": [3 + i] * (4 + 6 * i)} for i in range(3)]
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}


def llama(**rope):
    rope = {"rope_theta": 10000.0, "factor": 4.0, **rope}
    config = LlamaConfig(
        **SIZES, intermediate_size=32, num_hidden_layers=3, num_key_value_heads=1,
        max_position_embeddings=8, rope_parameters=rope,
    )  # fmt: skip
    return LlamaForCausalLM(config), "q_proj"


def deepseek():
    config = DeepseekV3Config(
        **SIZES, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=3,
        num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config), "o_proj"


def prepare(model, target, folder):
    options = LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")
    model = ila.attach(model, options)
    last = f".{len(find_blocks(model).layers) - 1}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and last in name)
    return PrefixCache.prepare(model, ROWS, default_collator(model), folder, progress=False)


MPT = {"vocab_size": 64, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 64}
OPT = SIZES | {"ffn_dim": 32, "num_hidden_layers": 3, "word_embed_proj_dim": 16, "dropout": 0.0}
LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 8}
REFUSED = {
    "dynamic": (lambda: llama(rope_type="dynamic"), "rope_type 'dynamic'"),
    "longrope": (lambda: llama(rope_type="longrope", **LONG), "rope_type 'longrope'"),
    "bloom": (
        lambda: (
            BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=3, n_head=2)),
            "query_key_value",
        ),
        "cache_prefix",
    ),
    "mpt": (
        lambda: (MptForCausalLM(MptConfig(**MPT)), "Wqkv"),
        "cache_prefix",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(family, tmp_path):
    make, said = REFUSED[family]
    with pytest.raises(ValueError, match=said):
        prepare(*make(), tmp_path)
    assert not (tmp_path / "states").exists()


EXACT = {
    "linear": lambda: llama(rope_type="linear"),
    "deepseek": deepseek,
    "opt": lambda: (OPTForCausalLM(OPTConfig(**OPT)), "q_proj"),
    "neox": lambda: (
        GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=32, num_hidden_layers=3)),
        "query_key_value",
    ),
}


@pytest.mark.parametrize("family", EXACT)
def test_a_model_is_cut_where_that_is_exact_or_refused_with_the_reason(family, tmp_path):
    try:
        cache = prepare(*EXACT[family](), tmp_path)
    except ValueError as why:
        assert "cache_prefix" in str(why)
    else:
        assert cache.blocks == 2 and len(cache.states) == 3

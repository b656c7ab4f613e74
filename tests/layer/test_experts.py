"""Experts of a mixture are tensors of their own: no mask closes them, and this is said."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import ila
from ila.models.merge import merge
from ila.training.adapter import Adapter

# PEFT looks for the pattern of the experts among modules, and finds them among parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
SIZES |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, head_dim=8)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)),
}


@pytest.fixture(params=FAMILIES)
def masked(request, tiny, tmp_path):
    torch.manual_seed(1)
    base = FAMILIES[request.param]()
    base.save_pretrained(tmp_path / "base")
    model = tiny.attached(tiny.config(target_modules="all-linear"), base).eval()
    report = ila.apply_mask(model, tiny.mask(model, lambda at, name: "layers.0" in name))
    return model, report


def test_what_lies_outside_of_the_mask_is_counted_and_said(masked, tiny):
    model, report = masked
    layers = set(tiny.layers(model))
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    beside = sum(c for n, c in trained.items() if not any(n.startswith(f"{m}.") for m in layers))
    assert 0 < beside == report.outside.parameters
    assert set(report.outside.kinds) == {"gate", "experts"}
    assert f"{beside:,} parameters are trained whatever a mask closes" in str(report)
    counts = Adapter(model).counts()
    assert counts["outside_parameters"] == beside
    assert counts["trainable_parameters"] == sum(trained.values())


def test_a_dense_model_has_nothing_outside(tiny):
    model = tiny.attached(tiny.config())
    report = ila.apply_mask(model, tiny.mask(model, lambda at, name: at == 0))
    assert report.outside.parameters == 0 and str(report).endswith("layers open")
    assert "outside_parameters" not in Adapter(model).counts()
    model = tiny.attached(tiny.config(modules_to_save=["lm_head"]))
    report = ila.apply_mask(model, tiny.mask(model, lambda at, name: at == 0))
    assert report.outside.kinds == ("lm_head",)


def test_the_saved_adapter_loads_in_plain_peft_and_merges(masked, tiny, tmp_path):
    model, _ = masked
    expected = model(tiny.tokens()).logits
    model.save_pretrained(tmp_path / "adapter")
    for finish in (lambda m: m, merge):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        plain = finish(tiny.loaded(base, tmp_path / "adapter")).eval()
        torch.testing.assert_close(plain(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_opened_again_the_configuration_is_what_it_was(masked, tiny):
    model, _ = masked
    config = model.peft_config["default"]
    before = (config.target_parameters, config.rank_pattern)
    ila.apply_mask(model, tiny.mask(model, lambda at, name: False))
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (config.target_parameters, config.rank_pattern) == before

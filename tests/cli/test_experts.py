"""A mixture of experts through learn, select, train and export: what no mask closes is said."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ila.masks.mask import LayerMask

# PEFT looks for the pattern of the experts among modules, and finds them among parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8},
    ),
}


@pytest.fixture(params=FAMILIES)
def mixture(request, tiny_model_folder, tmp_path) -> Path:
    """Save a random model of the family with the tokenizer of the tiny Llama."""
    kind, config, own = FAMILIES[request.param]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    torch.manual_seed(7)
    kind(config(**SIZES, **own, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tokens() -> torch.Tensor:
    return torch.arange(2 * 9).remainder(40).add(4).view(2, 9)


def test_learn_select_train_and_export(mixture, learn, ila, train, tmp_path):
    found = learn(tmp_path / "learned", "--model", mixture)
    assert found.code == 0, found.err
    mask = LayerMask.load(tmp_path / "learned")
    assert len(mask) == 8  # q, k, v and o of two blocks
    chosen = ila("select", tmp_path / "learned", "--top", "0.3", "--out", tmp_path / "mask.json")
    assert chosen.code == 0, chosen.err
    run = tmp_path / "run"
    answer = train(run, "--model", mixture, "--mask", tmp_path / "mask.json")
    assert answer.code == 0, answer.err
    opened = LayerMask.load(tmp_path / "mask.json").open
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["open_modules"], metrics["total_modules"], len(opened)) == (2, 8, 2)

    plain = AutoModelForCausalLM.from_pretrained(mixture)
    adapted = PeftModel.from_pretrained(plain, run).eval()
    tensors = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    layers = {n.rpartition(".lora_")[0] for n in tensors if "experts" not in n and "gate" not in n}
    assert layers == set(opened)
    beside = sum(p.numel() for n, p in tensors.items() if n.rpartition(".lora_")[0] not in layers)
    assert 0 < beside == metrics["outside_parameters"]
    assert metrics["trainable_parameters"] == sum(p.numel() for p in tensors.values())
    assert f"{beside:,} parameters" in answer.out.replace("\n", " ")

    expected = adapted(tokens()).logits
    merged = ila("export", run, "--merge", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(whole(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert ila("export", run, "--out", tmp_path / "adapter").code == 0
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(mixture), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(again(tokens()).logits, expected)


def test_one_run_with_a_selection_and_its_resume(mixture, train, tmp_path):
    answer = train(tmp_path / "one", "--model", mixture, "--select-at", "0.5", "--top", "0.3")
    assert answer.code == 0, answer.err
    assert len(LayerMask.load(tmp_path / "one").open) == 2
    plain = AutoModelForCausalLM.from_pretrained(mixture)
    assert isinstance(PeftModel.from_pretrained(plain, tmp_path / "one"), PeftModel)


@pytest.mark.parametrize("budget", ["memory=1GiB", "parameters=10k"])
def test_a_budget_over_experts_is_refused_by_name(budget, mixture, learn, ila, tmp_path):
    assert learn(tmp_path / "learned", "--model", mixture).code == 0
    line = ila("select", tmp_path / "learned", "--budget", budget).error()
    kind = json.loads((mixture / "config.json").read_text())["model_type"]
    assert f"this model is '{kind}'" in line

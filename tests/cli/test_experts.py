"""A mixture of experts through learn, select, train and export: its tensors open and close."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.models.tensors import named_layers

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


def adapted(mixture, folder) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mixture), folder).eval()


def layers_of(model) -> dict[str, int]:
    """Return layer name -> parameters of its adapter, of a model that PEFT loaded."""
    layers = named_layers(model, LoraLayer)
    parts = ("lora_A", "lora_B")
    return {
        name: sum(getattr(layer, part)["default"].weight.numel() for part in parts)
        for name, layer in layers.items()
    }


def closing(folder: Path, mask: LayerMask, closed) -> Path:
    """Write a mask that closes the layers for which ``closed(name)`` holds."""
    gates = {name: not closed(name) for name in mask.scores}
    LayerMask(mask.scores, gates, thawed(mask.provenance)).save(folder / "closing.json")
    return folder / "closing.json"


# Both tensors of the first block, and one of two in the second.
def first_and_outer(name: str) -> bool:
    return ".layers.0." in name or name.endswith(".experts.down_proj")


def test_learn_select_train_and_export(mixture, learn, ila, train, tmp_path):
    found = learn(tmp_path / "learned", "--model", mixture)
    assert found.code == 0, found.err
    mask = LayerMask.load(tmp_path / "learned")
    assert len(mask) == 14  # q, k, v, o, the router and two tensors of two blocks
    assert len(set(mask.scores.values())) > 7
    assert "whatever a mask closes" not in found.out
    chosen = ila("select", tmp_path / "learned", "--top", "0.3", "--out", tmp_path / "mask.json")
    assert chosen.code == 0 and "4 of 14 layers open" in chosen.out, chosen
    run = tmp_path / "run"
    answer = train(run, "--model", mixture, "--mask", tmp_path / "mask.json")
    assert answer.code == 0, answer.err
    assert "whatever a mask closes" not in answer.out.replace("\n", " ")
    check_run(mixture, run, LayerMask.load(tmp_path / "mask.json"), ila, tmp_path)
    printed = json.loads((run / "metrics.json").read_text())["trainable_parameters"]
    assert f"{printed:,}" in answer.out


def check_run(mixture, run, mask, ila, tmp_path):
    """Check that the open layers alone are saved, and that plain PEFT and export agree."""
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["open_modules"], metrics["total_modules"]) == (len(mask.open), 14)
    plain = adapted(mixture, run)
    sizes, learned = layers_of(plain), thawed(mask.provenance)["search"]["parameters"]
    assert sizes == {name: learned[name] for name in mask.open}
    assert metrics["trainable_parameters"] == sum(sizes.values())
    assert "outside_parameters" not in metrics

    expected = plain(tokens()).logits
    merged = ila("export", run, "--merge", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(whole(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    assert ila("export", run, "--out", tmp_path / "adapter").code == 0
    again = adapted(mixture, tmp_path / "adapter")
    torch.testing.assert_close(again(tokens()).logits, expected, rtol=0, atol=0)


def test_closed_experts_make_a_prefix_and_one_open_tensor_of_two_is_saved(
    mixture, learn, ila, train, tmp_path
):
    assert learn(tmp_path / "learned", "--model", mixture).code == 0
    file = closing(tmp_path, LayerMask.load(tmp_path / "learned"), first_and_outer)
    shown = ila("explain", "--model", mixture, "--mask", file)
    assert shown.code == 0 and "6 of 14 layers open, 7 in the frozen prefix" in shown.out, shown
    results = {}
    for name, more in {
        "plain": (),
        "cached": ("--cache-prefix",),
        "checkpointed": ("--gradient-checkpointing",),
    }.items():
        run = tmp_path / name
        answer = train(run, "--model", mixture, "--mask", file, *more)
        assert answer.code == 0, answer.err
        results[name] = json.loads((run / "metrics.json").read_text())
    cache = results["cached"]["prefix_cache"]
    assert cache["blocks"] == 1 and results["plain"]["prefix_cache"] is None
    for name in ("cached", "checkpointed"):
        found, expected = (dict(results[n]["losses"]) for n in (name, "plain"))
        assert len(found) == 4 and found == pytest.approx(expected, rel=1e-5)
    check_run(mixture, tmp_path / "plain", LayerMask.load(file), ila, tmp_path)


@pytest.mark.parametrize("closed", ["drop", "keep"])
def test_a_run_that_was_broken_off_goes_on_under_its_mask(
    mixture, learn, train, tmp_path, closed, monkeypatch
):
    learned = tmp_path / "learned"
    assert learn(learned, "--model", mixture, "--method", "gate_gradient").code == 0
    file = closing(tmp_path, LayerMask.load(learned), first_and_outer)
    options = (
        "--model",
        mixture,
        "--mask",
        file,
        "--closed",
        closed,
        "--from",
        learned / "adapter",
    )
    whole = train(tmp_path / "whole", *options)
    assert whole.code == 0, whole.err
    one = resumed_alike(train, tmp_path, monkeypatch, *options)
    mask = LayerMask.load(file)
    held = set(mask.open if closed == "drop" else mask.scores)
    assert set(layers_of(adapted(mixture, tmp_path / "cut"))) == held
    start = load_file(learned / "adapter" / "adapter_model.safetensors")
    if closed == "keep":
        frozen = [name for name in one if ".layers.0." in name]
        assert frozen and all(torch.equal(one[name], start[name]) for name in frozen)
        assert any(not torch.equal(one[name], start[name]) for name in one)


def resumed_alike(train, tmp_path, monkeypatch, *options) -> dict[str, torch.Tensor]:
    """Break a run off after step 2, go on with it, and compare it with the run in ``whole``."""

    def broken_off(*_):
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr("ila.training.train.losses", broken_off)
        assert train(tmp_path / "cut", *options).code != 0
    # As if the run had ended at step 2: the last checkpoint is gone.
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-4")
    resumed = train(tmp_path / "cut", *options, "--resume")
    assert resumed.code == 0, resumed.err
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    return one


@pytest.mark.parametrize(
    "method", ["path", "gate_gradient", "update_norm", "gradient_norm", "kappa"]
)
def test_a_method_scores_tensors(mixture, learn, tmp_path, method):
    steps = ("--stage2-steps", "5", "--stage1-steps", "3")
    answer = learn(tmp_path / "learned", "--model", mixture, "--method", method, *steps)
    assert answer.code == 0, answer.err
    scores = LayerMask.load(tmp_path / "learned").scores
    tensors = [score for name, score in scores.items() if ".experts." in name or ".gate" in name]
    assert len(tensors) == 6 and len(set(tensors)) == 6


def test_a_method_of_linear_layers_is_refused(mixture, learn, tmp_path):
    line = learn(tmp_path / "learned", "--model", mixture, "--method", "output_norm").error()
    assert "method must not be 'output_norm' where experts have adapters" in line
    assert "mlp" in line and "'path'" in line


def test_a_share_of_the_model_ranks_experts_and_a_rule_opens_no_router(mixture, ila, tmp_path):
    out = tmp_path / "half.json"
    answer = ila("select", mixture, "--top", "0.5", "--out", out)
    assert answer.code == 0
    (line,) = [text for text in answer.out.splitlines() if "Ranked by kappa, from the we" in text]
    routers = sum(name.endswith(".gate") for name in LayerMask.load(out).open)
    assert routers and f"{routers} gate," in line
    mlps = tmp_path / "mlps.json"
    assert ila("select", mixture, "--layers", "last-mlps:1", "--out", mlps).code == 0
    opened = LayerMask.load(mlps).open
    assert opened and all("layers.1.mlp.experts" in name for name in opened)


def test_a_rule_opens_tensors_and_a_format_names_them(mixture, ila, train, tmp_path):
    file = tmp_path / "rule.json"
    chosen = ila("select", mixture, "--layers", "last:1", "--out", file, "--format", "peft")
    assert chosen.code == 0 and "backward skips 1 of 2" in chosen.out, chosen
    targets = json.loads((tmp_path / "rule.peft.json").read_text())
    assert sorted(targets["target_parameters"]) == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.gate.weight",
    ]
    config = LoraConfig(r=2, **targets)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(mixture), config)
    assert set(layers_of(plain)) == set(LayerMask.load(file).open)
    experts = ila("select", mixture, "--layers", "experts.gate_up_proj", "--out", file)
    assert experts.code == 0 and "2 of 14 layers open" in experts.out, experts
    answer = train(tmp_path / "run", "--model", mixture, "--mask", file)
    assert answer.code == 0, answer.err
    assert len(layers_of(adapted(mixture, tmp_path / "run"))) == 2


@pytest.mark.parametrize("closed", ["drop", "keep"])
def test_one_run_with_a_selection_and_its_resume(mixture, train, tmp_path, closed, monkeypatch):
    options = ("--model", mixture, "--select-at", "0.5", "--top", "0.3", "--closed", closed)
    answer = train(tmp_path / "whole", *options)
    assert answer.code == 0, answer.err
    mask = LayerMask.load(tmp_path / "whole")
    assert (len(mask), len(mask.open)) == (14, 4)
    sizes = layers_of(adapted(mixture, tmp_path / "whole"))
    assert set(sizes) == set(mask.open if closed == "drop" else mask.scores)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert metrics["trainable_parameters"] == sum(sizes[name] for name in mask.open)
    resumed_alike(train, tmp_path, monkeypatch, *options)
    assert LayerMask.load(tmp_path / "cut").open == mask.open


@pytest.mark.parametrize("budget", ["memory=1GiB", "parameters=10k"])
def test_a_budget_over_experts_is_refused_by_name(budget, mixture, learn, ila, tmp_path):
    assert learn(tmp_path / "learned", "--model", mixture).code == 0
    line = ila("select", tmp_path / "learned", "--budget", budget).error()
    kind = json.loads((mixture / "config.json").read_text())["model_type"]
    assert f"this model is '{kind}'" in line

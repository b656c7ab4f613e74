"""Kinds of adapter on the command line: AdaLoRA, rsLoRA, DoRA."""

import json

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

from ila.masks.mask import LayerMask
from ila.runs.metrics import load_run

# PEFT looks for the ranks of AdaLoRA among those of LoRA when it loads an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match")


def adapter_of(run, tiny_model_folder):
    """Load the adapter of a run by PEFT alone; return the names of its layers and its config."""
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    model = PeftModel.from_pretrained(base, str(run))
    names = {n for n, m in model.named_modules() if "default" in getattr(m, "lora_A", ())}
    return names, model.peft_config["default"]


def test_adalora_is_learned_selected_trained_and_merged(
    ila, learn, train, tmp_path, tiny_model_folder
):
    run, out = tmp_path / "learned", tmp_path / "trained"
    kind = ("--adapter", "adalora", "--rank", "2", "--tinit", "1")
    assert learn(run, *kind, "--method", "path").code == 0
    mask_file = tmp_path / "best.json"
    assert ila("select", run, "--top", "0.3", "--out", mask_file).code == 0
    mask = LayerMask.load(mask_file)
    answer = train(out, *kind, "--mask", mask_file, "--steps", "6")
    assert answer.code == 0, answer.err
    names, config = adapter_of(out, tiny_model_folder)
    assert names == set(mask.open) and len(names) < 14
    assert (config.init_r, config.target_r, config.tinit, config.total_step) == (3, 2, 1, 6)
    assert sum(map(sum, config.rank_pattern.values())) == 2 * len(names)
    assert load_run(out)["open_modules"] == len(names)
    assert "AdaLoRA" not in (out / "run.json").read_text()
    assert json.loads((out / "run.json").read_text())["inputs"]["adapter"] == "adalora"
    assert train(out, *kind, "--mask", mask_file, "--steps", "6", "--resume").code == 0
    again = ila("train", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert load_run(tmp_path / "again")["losses"] == load_run(out)["losses"]
    assert ila("export", out, "--merge", "--out", tmp_path / "merged").code == 0
    LlamaForCausalLM.from_pretrained(tmp_path / "merged")


def test_rslora_and_dora_reach_peft(train, tmp_path, tiny_model_folder):
    for name in ("use_rslora", "use_dora"):
        answer = train(tmp_path / name, f"--{name.replace('_', '-')}")
        assert answer.code == 0, answer.err
        assert getattr(adapter_of(tmp_path / name, tiny_model_folder)[1], name)
    assert (tmp_path / "use_rslora/metrics.json").read_text() != (
        tmp_path / "use_dora/metrics.json"
    ).read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--adapter", "loha"), "adapter must be one of"),
        (("--tinit", "2"), "tinit does nothing with adapter 'lora'"),
        (("--adapter", "adalora", "--use-dora"), "use_dora does nothing with adapter 'adalora'"),
        (("--adapter", "adalora", "--deltaT", "0"), "deltaT must be ≥ 1, got 0"),
        (("--adapter", "adalora", "--tinit", "500"), "must be below the 4 steps"),
        (("--adapter", "adalora", "--select-at", "0.5", "--top", "0.3"), "--adapter lora"),
    ],
)
def test_options_that_do_not_fit_are_one_line(train, tmp_path, options, said):
    assert said in train(tmp_path / "out", *options).error()
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("option", [("--adapter", "adalora"), ("--use-dora",)])
def test_a_training_in_full_has_no_kind_of_adapter(ila, source, tmp_path, option):
    without_rank = source[: source.index("--rank")]
    answer = ila("train", *without_rank, "--out", tmp_path / "out", "--full", *option)
    assert f"{option[0]} does nothing here: --full trains no adapter" in answer.error()


def test_a_run_of_lora_is_described_as_before(train, tmp_path):
    assert train(tmp_path / "out").code == 0
    inputs = json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]
    assert "rank" in inputs and not {"adapter", "tinit", "use_dora"} & set(inputs)
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "adapter" not in text and "use_dora" not in text

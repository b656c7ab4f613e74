"""`--load-in`: learn, select and train over a packed base, and merge into the dense one."""

import json

import pytest
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from ila.masks.mask import LayerMask
from ila.models import loading
from ila.runs.metrics import load_run

pytest.importorskip("bitsandbytes")


def test_the_main_path_over_four_bits(ila, learn, train, tmp_path, tiny_model_folder):
    found, run = tmp_path / "found", tmp_path / "run"
    answer = learn(found, "--load-in", "4bit", "--method", "path")
    assert answer.code == 0, answer.err
    mask = LayerMask.load(found)
    assert len(mask.open) == 14 and len(set(mask.scores.values())) == 14
    assert ila("select", found, "--top", "0.3").code == 0

    options = ("--load-in", "4bit", "--mask", found / "mask-top-0.3.json")
    answer = train(run, *options)
    assert answer.code == 0 and "4 of 14" in answer.out, answer.err
    described = json.loads((run / "run.json").read_text())
    assert described["inputs"]["load_in"] == "4bit"
    assert load_run(run)["dtype"] == "float32 over nf4"
    assert load_run(run)["held_out_loss"] != load_run(run)["held_out_loss_before"]
    line = train(run, *options[2:], "--resume").error()
    assert "holds a run that differs in inputs.load_in" in line

    answer = ila("export", run, "--out", tmp_path / "merged", "--merge")
    assert answer.code == 0 and "dense" in answer.out, answer.err
    note = json.loads((tmp_path / "merged" / "ila-export.json").read_text())
    assert note["trained_over"] == "4bit"
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    adapted = PeftModel.from_pretrained(base, str(run)).merge_and_unload()
    theirs = adapted.state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in merged.state_dict().items())
    AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_a_mask_is_of_the_model_however_its_weights_are_packed(learn, train, tmp_path):
    assert learn(tmp_path / "found").code == 0
    mask = tmp_path / "found" / "mask.json"
    answer = train(tmp_path / "run", "--load-in", "8bit", "--mask", mask)
    assert answer.code == 0, answer.err
    learned = LayerMask.load(mask).provenance["model"]
    trained = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    assert learned == trained
    assert load_run(tmp_path / "run")["dtype"] == "float32 over llm_int8"


def test_mistakes(train, tmp_path, monkeypatch):
    line = train(tmp_path / "a", "--load-in", "3bit").error()
    assert "load_in must be one of ('4bit', '8bit'), got '3bit'" in line
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    line = train(tmp_path / "a", "--load-in", "4bit").error()
    assert "load_in='4bit' needs bitsandbytes: pip install 'ila-kernels[quant]'" in line
    assert not (tmp_path / "a").exists()


def test_a_gguf_file_is_not_packed_again(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="load_in='8bit' needs a model that is no GGUF file"):
        loading.load_model(loading.find_source(str(tmp_path)), load_in="8bit")

"""``ila train --select-at``: one command that searches, selects and trains; and warm starts."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from ila.masks.mask import LayerMask
from ila.training.rates import usual_rate


def test_one_command_leaves_mask_picture_log_and_adapter(train, tmp_path, tiny_model_folder, ila):
    out = tmp_path / "one"
    answer = train(out, "--select-at", "0.5", "--top", "0.3", "--steps", "6")
    assert answer.code == 0, answer.err
    assert "all 14 layers, 3 steps:" in answer.out and "4 layers, 3 steps:" in answer.out
    assert "All layers for all 6 steps would have taken" in answer.out
    assert "4 of 14" in answer.out and "(29%), 10 kept" in answer.out
    mask = LayerMask.load(out)
    assert len(mask.open) == 4 and mask.provenance["model"]["config_fingerprint"]
    assert (out / "heatmap.png").stat().st_size > 1000
    assert len((out / "log.jsonl").read_text().splitlines()) == 6
    assert not {"checkpoints", "search"} & {path.name for path in out.iterdir()}
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    plain = PeftModel.from_pretrained(base, str(out))
    assert sum(hasattr(module, "lora_A") for module in plain.modules()) == 14
    assert ila("export", out, "--merge", "--out", tmp_path / "merged").code == 0
    assert "holds a run already" in train(out, "--select-at", "0.5", "--top", "0.3").error()
    other = train(out, "--select-at", "3", "--top", "0.5", "--steps", "6", "--resume").error()
    assert "differs in selection" in other


def test_blocks_are_dropped_and_the_cache_begins_with_the_selection(train, tmp_path):
    options = ("--select-at", "2", "--blocks", "last:1", "--cache-prefix")
    answer = train(tmp_path / "kept", *options)
    assert answer.code == 0 and "cache of 1 blocks" in answer.out
    answer = train(tmp_path / "dropped", *options, "--closed", "drop")
    assert "7 of 14" in answer.out and "kept" not in answer.out.replace("kept/", "")
    config = json.loads((tmp_path / "dropped" / "adapter_config.json").read_text())
    assert all("layers.1." in name for name in config["target_modules"])


def test_a_search_made_apart_is_gone_on_with(learn, train, ila, tmp_path):
    run = tmp_path / "search"
    assert learn(run).code == 0
    mask = tmp_path / "mask.json"
    assert ila("select", run, "--top", "0.3", "--out", mask).code == 0
    warm = train(tmp_path / "warm", "--mask", mask, "--from", run / "adapter")
    assert warm.code == 0 and "10 kept" in warm.out and "Learning rate" not in warm.out
    losses = json.loads((tmp_path / "warm" / "metrics.json").read_text())
    learned = LayerMask.load(run).provenance["held_out_loss"]["after_stage1"]
    assert losses["held_out_loss_before"] == pytest.approx(learned, rel=1e-6)
    again = train(tmp_path / "warm", "--mask", mask, "--from", run / "adapter", "--resume")
    assert again.code == 0
    cold = train(tmp_path / "warm", "--mask", mask, "--closed", "keep", "--resume")
    assert "differs in from" in cold.error()
    other = train(tmp_path / "other", "--mask", mask, "--from", run / "adapter", "--alpha", "4")
    assert "give --rank and --alpha of the search" in other.error()


def test_the_rate_follows_the_share_that_is_open(learn, train, ila, tmp_path, monkeypatch):
    run = tmp_path / "search"
    learn(run)
    for share, rate in ((1.0, 2e-4), (0.3, usual_rate(4 / 14))):
        mask = tmp_path / f"{share}.json"
        ila("select", run, "--top", share, "--out", mask)
        out = tmp_path / f"run-{share}"
        found = ila(
            *("train", "--model", json.loads((run / "run.json").read_text())["inputs"]["model"]),
            *("--data", json.loads((run / "run.json").read_text())["inputs"]["data"]),
            *("--rank", 2, "--mask", mask, "--steps", 2, "--batch-size", 2, "--out", out),
        )
        assert found.code == 0, found.err
        assert json.loads((out / "metrics.json").read_text())["config"]["learning_rate"] == rate
        assert ("Learning rate" in found.out) == (rate != 2e-4)


@pytest.mark.parametrize("closed", ["keep", "drop"])
def test_what_one_command_exports_is_what_plain_peft_computes_and_merges(
    train, ila, tmp_path, tiny_model_folder, closed
):
    run = tmp_path / "run"
    options = ("--select-at", "2", "--top", "0.3", "--closed", closed, "--learning-rate", "0.05")
    assert train(run, *options).code == 0
    assert ila("export", run, "--out", tmp_path / "plain").code == 0
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert ila("export", run, "--merge", "--out", tmp_path / "merged").code == 0
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "plain"))
    assert sum(hasattr(m, "lora_A") for m in plain.modules()) == (14 if closed == "keep" else 4)
    expected = plain.merge_and_unload().state_dict()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="share must be in"):
        usual_rate(share)


def test_the_rate_falls_with_the_share_and_doubles_at_thirty_percent():
    rates = [usual_rate(share / 100) for share in range(1, 101)]
    assert rates == sorted(rates, reverse=True)
    assert usual_rate(0.3) == pytest.approx(2 * usual_rate()) and rates[0] == 3 * usual_rate()
    assert usual_rate(0.3, full=True) == usual_rate(full=True) == 2e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top", "0.3"), "--top selects in the middle of a run; give --select-at too"),
        (("--select-at", "0.5"), "exactly one of top, freeze, budget, blocks must be given, got"),
        (("--select-at", "4", "--top", "0.3"), "at must leave steps before and after the switch"),
        (("--select-at", "0.5", "--top", "0.3", "--full"), "leave out --full"),
        (("--select-at", "0.5", "--top", "0.3", "--mask", "m.json"), "leave out --mask"),
        (("--select-at", "0.5", "--top", "0.3", "--from", "a"), "--from goes on from an adapter"),
        (("--closed", "keep"), "--closed says how layers close; give --mask or --select-at"),
        (("--select-at", "0.5", "--top", "0.3", "--closed", "x"), "closed must be one of"),
        (("--select-at", "0.5", "--budget", "time=0.5"), "budget time needs speed"),
    ],
)
def test_options_that_do_not_fit_are_refused(train, tmp_path, options, message):
    assert message in train(tmp_path / "run", *options).error()
    assert not Path(tmp_path / "run").exists()

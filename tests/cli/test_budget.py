"""`ila measure` and `ila select --budget` on a tiny model, and what they refuse."""

import json
import shutil

import pytest

from ila.masks.mask import LayerMask


@pytest.fixture
def learned(learn, tmp_path):
    out = tmp_path / "learned"
    assert learn(out, "--method", "path", "--max-length", "24").code == 0
    return out


def test_a_budget_selects_says_so_and_draws(ila, learned, tmp_path):
    speed = tmp_path / "speed.json"
    mask = LayerMask.load(learned)
    model = mask.provenance["inputs"]["model"]
    shape = ("--batch-size", "2", "--max-length", "24", "--rank", "2", "--rounds", "1")
    answer = ila("measure", "--model", model, "--out", speed, *shape)
    assert answer.code == 0 and "a step left out of the fit" in answer.out
    rates = json.loads(speed.read_text())
    assert rates["measured"]["rows"] == 2 and len(rates["measured"]["steps"]) >= 8
    assert rates["measured"]["few_labels_ms"] > 0

    answer = ila("select", learned, "--budget", "time=1", "--speed", speed)
    assert answer.code == 0 and "100.0% of the importance" in answer.out
    best = LayerMask.load(learned / "mask-time-1.json")
    data = mask.provenance["data"]
    share = data["answer_tokens"] / data["tokens"]
    assert best.provenance["selection"]["step"] == {"rows": 2, "length": 24, "answers": share}
    assert f"{share:.0%} of them labels, by the rates measured on cpu" in answer.out
    assert {best.scores[name] > 0 for name in best.open} == {True}
    assert (learned / "mask-time-1.png").read_bytes().startswith(b"\x89PNG")

    few = ila("select", learned, "--budget", "parameters=0.3k", "--out", tmp_path / "few.json")
    assert few.code == 0 and "Plain top-k within the same budget" in few.out
    selection = LayerMask.load(tmp_path / "few.json").provenance["selection"]
    assert selection["budget"] == "parameters=0.3k"
    assert selection["chosen"]["parameters"] <= 300
    assert selection["chosen"]["importance"] >= selection["plain_top"]["importance"]

    wrong = ila("select", learned, "--budget", "time=1", "--speed", speed, "--batch-size", "3")
    assert "speed was measured with rows 2, got 3" in wrong.error()


def test_a_wrong_budget_is_one_clear_line(ila, learned, contents):
    before = contents(learned)
    for options, said in (
        (("--budget", "time=0.6"), "needs --speed: a file that `ila measure` wrote"),
        (("--budget", "time=0.6", "--speed", "GPU"), "or one of"),
        (("--budget", "memory=1"), "a number in MiB, GiB"),
        (("--budget", "memory=1KiB"), "got '1KiB'"),
        (("--budget", "memory=0.001MiB"), "below the cheapest possible"),
        (("--budget", "memory=1GiB", "--speed", "GPU"), "--speed does nothing for a budget of"),
        (("--budget", "memory=1GiB", "--top", "0.5"), "exactly one of"),
        (("--top", "0.5", "--speed", "GPU"), "--speed does nothing without --budget"),
    ):
        assert said in ila("select", learned, *options).error()
    assert contents(learned) == before


def test_a_mask_that_does_not_say_its_model_is_refused(ila, tmp_path):
    LayerMask({"layers.0.q_proj": 1.0}).save(tmp_path / "mask.json")
    line = ila("select", tmp_path, "--budget", "parameters=1M").error()
    assert "the mask does not say its model; a budget needs a mask that `ila learn` wrote" in line


def test_a_dtype_that_nobody_says_is_not_guessed(ila, learned, tmp_path):
    mask = LayerMask.load(learned)
    folder = tmp_path / "model"
    shutil.copytree(mask.provenance["inputs"]["model"], folder)
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(kept))
    known = {k: v for k, v in mask.provenance.items() if k != "model"}
    LayerMask(mask.scores, provenance=known).save(tmp_path / "mask.json")
    options = ("--budget", "memory=1MiB", "--model", folder)
    line = ila("select", tmp_path / "mask.json", *options).error()
    assert "the dtype of the model's weights must be one of bfloat16, float16, float32" in line

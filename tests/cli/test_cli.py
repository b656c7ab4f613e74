"""The command line: what each command promises, and one clear line for every mistake."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
)

from ila.commands.select_share import select
from ila.masks.mask import LayerMask
from ila.models.layer import MaskedLoraLinear
from ila.runs.metrics import load_run
from ila_kernels import __version__

REPOSITORY = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


class Killed(BaseException):
    """A kill: nothing that catches `Exception` sees it."""


def logits(model, tokenizer):
    batch = tokenizer("a b c d e f g", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"]).logits


def base_of(folder):
    return LlamaForCausalLM.from_pretrained(folder)


# ---- the main path


def test_rows_of_like_length_come_together_if_asked(learn, train, tmp_path):
    for command, name in ((learn, "learned"), (train, "trained")):
        plain = command(tmp_path / name)
        grouped = command(tmp_path / f"{name}-grouped", "--group-by-length")
        assert "of a batch; " in plain.out and "with --group-by-length" in plain.out
        assert grouped.code == 0 and "if drawn at random" in grouped.out
    settings = json.loads((tmp_path / "trained-grouped/metrics.json").read_text())["config"]
    assert "group_by_length" in str(settings["training_args"])


def test_the_main_path(ila, learn, train, tmp_path, tiny_model_folder):
    first, second = tmp_path / "first", tmp_path / "second"
    answer = learn(first)
    assert answer.code == 0, answer.err
    assert "To train on: 11 of 11 rows" in answer.out
    assert "Held out: 1 of 1 rows" in answer.out
    assert "scores of 14 layers" in answer.out
    assert learn(second, "--seed", "1", "--method", "path").code == 0
    for run in (first, second):
        names = {path.name for path in run.iterdir()}
        assert names >= {"mask.json", "heatmap.png", "log.jsonl", "adapter", "run.json"}
        assert not names & {"stage1", "stage2"}  # checkpoints go when the mask is there
        assert (run / "heatmap.png").read_bytes().startswith(PNG)
        PeftModel.from_pretrained(base_of(tiny_model_folder), str(run / "adapter"))
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for stage, steps in (("stage1", 4), ("stage2", 5)):
            losses = [e["step"] for e in log if e["stage"] == stage and "loss" in e]
            assert losses == list(range(1, steps + 1))
    written = (first / "mask.json").stat().st_mtime_ns
    assert learn(first, "--resume").code == 0  # finished: nothing is run or written again
    assert (first / "mask.json").stat().st_mtime_ns == written
    mask = LayerMask.load(first)
    assert len(mask.open) == 14
    assert mask.provenance["search"]["config"]["method"] == "ila"
    assert mask.provenance["seed"] == 0 == mask.provenance["search"]["config"]["seed"]
    held = mask.provenance["held_out_loss"]
    assert held["rows"] == 1 and held["before"] > 0 and held["after_stage1"] != held["before"]

    answer = ila("select", first, "--top", "0.3")
    assert answer.code == 0 and "4 of 14 layers open" in answer.out
    chosen = first / "mask-top-0.3.json"
    assert LayerMask.load(chosen).open == mask.top(0.3).open
    assert LayerMask.load(chosen).provenance["selection"] == {"top": 0.3, "freeze": None}
    assert ila("select", first, "--freeze", "0.25", "--out", tmp_path / "f.json").code == 0
    assert LayerMask.load(tmp_path / "f.json").open == mask.without_bottom(0.25).open

    every, some = tmp_path / "every", tmp_path / "some"
    assert train(every).code == 0
    answer = train(some, "--mask", chosen)
    assert answer.code == 0 and "4 of 14" in answer.out
    assert load_run(some)["open_modules"] == 4 and load_run(every)["open_modules"] == 14
    assert load_run(some)["trainable_parameters"] < load_run(every)["trainable_parameters"]

    assert ila("report", every, some, "--out", tmp_path / "report").code == 0
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(PNG)
    table = (tmp_path / "report" / "report.md").read_text()
    assert "every" in table and "some" in table

    answer = ila("compare", first, second, "--json", tmp_path / "c.json")
    assert answer.code == 0 and "first" in answer.out and "second" in answer.out
    (row,) = json.loads((tmp_path / "c.json").read_text())
    assert row["spearman"] == pytest.approx(mask.spearman(LayerMask.load(second)))


def test_what_is_exported_computes_what_was_trained(ila, train, tmp_path, tiny_model_folder):
    run = tmp_path / "run"
    assert train(run, "--learning-rate", "0.05").code == 0
    assert ila("export", run, "--out", tmp_path / "plain").code == 0
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "plain")("a b")["input_ids"]
        == AutoTokenizer.from_pretrained(tiny_model_folder)("a b")["input_ids"]
    )
    answer = ila("export", run, "--out", tmp_path / "merged", "--merge")
    assert answer.code == 0 and "Merged model" in answer.out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    bare = logits(base_of(tiny_model_folder), tokenizer)
    adapted = PeftModel.from_pretrained(base_of(tiny_model_folder), str(tmp_path / "plain"))
    assert not any(isinstance(module, MaskedLoraLinear) for module in adapted.modules())
    expected = logits(adapted, tokenizer)
    assert (expected - bare).abs().max() > 1e-2
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    # float32, two blocks, logits of magnitude 3.
    torch.testing.assert_close(logits(merged, tokenizer), expected, rtol=1e-5, atol=1e-5)
    note = json.loads((tmp_path / "merged" / "ila-export.json").read_text())
    assert note["merged"] is True and note["base"]["architecture"] == "LlamaForCausalLM"


def test_the_command_runs_in_a_process_of_its_own(source, tmp_path):
    def shell(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "ila.cli", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done

    run = tmp_path / "run"
    steps = ("--stage1-steps", "2", "--stage2-steps", "5", "--batch-size", "2")
    done = shell("learn", *source, *steps, "--out", run)
    assert done.returncode == 0, done.stderr
    assert (run / "mask.json").is_file() and "Traceback" not in done.stderr
    done = shell("compare", run)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: give at least two runs to compare, got 1\n"


def test_version_stands_before_any_command(ila):
    answer = ila("--version")
    assert (answer.code, answer.out) == (0, f"ila-kernels {__version__}\n")
    assert "--version" in ila("--help").out


def test_the_small_trained_model_takes_the_main_path_too(ila, stories260k, data, tmp_path):
    options = ("--model", stories260k, "--data", data, "--batch-size", "2", "--rank", "2")
    steps = ("--stage1-steps", "2", "--stage2-steps", "5", "--save-every", "0")
    assert ila("learn", *options, *steps, "--out", tmp_path / "a").code == 0
    assert len(LayerMask.load(tmp_path / "a")) == 7 * 5
    assert ila("select", tmp_path / "a", "--top", "0.2", "--out", tmp_path / "m.json").code == 0
    trained = ila(
        "train", *options, "--steps", "2", "--mask", tmp_path / "m.json", "--out", tmp_path / "b"
    )
    assert trained.code == 0 and load_run(tmp_path / "b")["open_modules"] == 7


# ---- resuming


def break_off(monkeypatch, call):
    calls, original = [], Trainer.training_step

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            monkeypatch.setattr(Trainer, "training_step", original)
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


@pytest.mark.parametrize("call", [4, 7])
def test_learn_resumed_after_a_kill_gives_the_same_files(
    call, learn, tmp_path, monkeypatch, contents
):
    assert learn(tmp_path / "whole", "--dropout", "0.1").code == 0
    break_off(monkeypatch, call)
    with pytest.raises(Killed):
        learn(tmp_path / "broken", "--dropout", "0.1")
    assert not (tmp_path / "broken" / "mask.json").exists()
    assert learn(tmp_path / "broken", "--dropout", "0.1", "--resume").code == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_train_resumed_after_a_kill_gives_the_same_files(train, tmp_path, monkeypatch, contents):
    assert train(tmp_path / "whole").code == 0
    break_off(monkeypatch, 4)
    with pytest.raises(Killed):
        train(tmp_path / "broken")
    answer = train(tmp_path / "broken", "--resume")
    assert answer.code == 0
    whole, broken = contents(tmp_path / "whole"), contents(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    differing = {name for name in whole if whole[name] != broken[name]}
    assert differing == {"metrics.json"}  # times, memory, and the name of the folder
    assert load_run(tmp_path / "broken")["losses"] == load_run(tmp_path / "whole")["losses"]


@pytest.mark.parametrize(
    ("arguments", "where", "said"),
    [
        (
            ("learn", "--out", "{tmp}/run"),
            "commands.learn.learn",
            "; the same command with --resume goes on",
        ),
        (
            ("train", "--out", "{tmp}/run"),
            "commands.train.train_selected",
            "; the same command with --resume",
        ),
        (("export", "{tmp}/run", "--out", "{tmp}/e"), "commands.export.export", ""),
        (("select", "{tmp}/mask.json", "--top", "0.5"), "commands.select_share.select", ""),
        (("report", "{tmp}"), "commands.report.report", ""),
    ],
)
def test_ctrl_c_says_how_to_go_on_where_that_can_be(
    arguments, where, said, ila, source, tmp_path, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ila.{where}", interrupted)
    filled = [text.format(tmp=tmp_path) for text in arguments]
    answer = ila(*filled, *(source if filled[0] in ("learn", "train") else ()))
    assert answer.code == 130
    (line,) = [line for line in answer.err.splitlines() if "interrupted" in line]
    assert line.startswith(f"interrupted{said}") and ("--resume" in line) is bool(said)


def test_a_missing_package_is_one_clear_line(learn, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("ila.models.loading.find_spec", lambda name: None)
    line = learn(tmp_path / "run", "--model", tmp_path / "model.gguf").error()
    assert line.endswith("model.gguf needs the package gguf: pip install 'ila-kernels[gguf]'")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in learn(tmp_path / "run", "--data", "org/set").error()
    assert not (tmp_path / "run").exists()


# ---- a folder that is not free


def test_a_run_is_not_overwritten(learn, train, tmp_path, contents):
    run = tmp_path / "run"
    assert learn(run).code == 0
    before = contents(run)
    assert f"folder {run} holds a run already" in learn(run).error()
    assert f"folder {run} holds a run already" in train(run).error()
    for options, field in (
        (("--rank", "3"), "inputs.rank"),
        (("--seed", "1"), "inputs.seed"),
        (("--stage2-steps", "6"), "stage2_steps"),
        (("--method", "path"), "method"),
        (("--limit", "8"), "inputs.limit"),
    ):
        line = learn(run, "--resume", *options).error()
        assert field in line and str(run) in line
    assert "differs in what" in train(run, "--resume").error()
    assert contents(run) == before


def test_a_row_is_named_by_its_place_in_the_file(train, tmp_path):
    good, bad = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "a", "completion": [{}]}\n'
    for place in (1, 6, 12):
        rows = [good] * 12
        rows[place - 1] = bad
        (tmp_path / "rows.jsonl").write_text("".join(rows))
        for held_out in ("0", "0.5"):
            line = train(
                tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--held-out", held_out
            ).error()
            assert f"): row {place}: completion: a message must have a role" in line


def test_what_was_dropped_of_the_held_out_rows_is_counted(train, tmp_path, data):
    mute = '{"prompt": "a", "completion": ""}\n'
    (tmp_path / "rows.jsonl").write_text(data.read_text() + mute * 12)
    answer = train(tmp_path / "run", "--data", tmp_path / "rows.jsonl", "--held-out", "0.5")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    for part, counts in (("To train on", kept), ("Held out", kept["held_out"])):
        assert counts["rows"] == 12 == counts["kept"] + counts["dropped_no_answer"]
        said = f"{part}: {counts['kept']} of 12 rows, {counts['dropped_no_answer']} dropped without"
        assert said in answer.out
    assert kept["kept"] + kept["held_out"]["kept"] == 12
    answer = train(tmp_path / "all", "--held-out", "0")
    assert "Held out: nothing." in answer.out


def test_near_copies_are_held_out_together_if_asked(learn, train, tmp_path):
    letters = "abcdefghijklmnopqrstuvwx"
    pairs = [(" ".join(letters[4 * i : 4 * i + 4]), end) for i in range(6) for end in "yz"]
    data = tmp_path / "copies.jsonl"
    rows = [{"prompt": prompt, "completion": end} for prompt, end in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (learn, train):
        for options, held_out in (((), 3), (("--group-copies",), 2)):
            folder = tmp_path / f"{command is learn}{held_out}"
            assert command(folder, "--data", data, "--held-out", "0.25", *options).code == 0
            found = json.loads((folder / "run.json").read_text())
            assert found["data"]["held_out"]["rows"] == held_out
            assert found["inputs"].get("group_copies", False) == bool(options)
    line = train(tmp_path / "none", "--held-out", "0", "--group-copies").error()
    assert "group_copies divides the rows that are held out; held_out is 0" in line


def test_other_data_or_another_model_is_no_resume(
    learn, tmp_path, contents, tiny_model_folder, data
):
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text(data.read_text())
    model = copy_of(tiny_model_folder, tmp_path / "model")
    options = ("--model", model, "--data", rows)
    assert learn(run, *options).code == 0
    before = contents(run)
    assert "differs in inputs.data;" in learn(run, "--resume", "--model", model).error()
    assert "differs in inputs.model;" in learn(run, "--resume", "--data", rows).error()
    # The same names, but not what they held.
    rows.write_text(data.read_text().replace("a b c", "c b a"))
    assert "differs in data.fingerprint;" in learn(run, "--resume", *options).error()
    rows.write_text(data.read_text())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "differs in model.config_fingerprint;" in learn(run, "--resume", *options).error()
    assert contents(run) == before


def test_a_folder_that_is_taken_is_found_before_anything_is_loaded(
    learn, train, tmp_path, monkeypatch
):
    run, other = tmp_path / "run", tmp_path / "other"
    assert learn(run).code == 0
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for name in ("load_model", "load_tokenizer", "load_rows"):
        monkeypatch.setattr(f"ila.commands.inputs.{name}", lambda *_, **__: pytest.fail("loaded"))
    assert "holds a run already" in learn(run).error()
    assert "differs in inputs.rank" in learn(run, "--resume", "--rank", "3").error()
    assert "differs in what" in train(run, "--resume").error()
    assert "is not the folder of a run" in train(other).error()


def test_a_run_begun_with_relative_paths_is_exported_from_elsewhere(
    ila, learn, train, tmp_path, tiny_model_folder, data, monkeypatch
):
    copy_of(tiny_model_folder, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(data.read_text())
    relative = ("--model", "model", "--data", "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert train("run", *relative).code == 0
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    assert inputs["model"] == str(tmp_path / "model")
    assert inputs["data"] == str(tmp_path / "rows.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer = ila("export", tmp_path / "run", "--out", "new/merged", "--merge")
    assert (
        answer.code == 0 and (tmp_path / "elsewhere" / "new" / "merged" / "config.json").is_file()
    )
    # And the same run said in another way is resumed.
    absolute = ("--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl")
    assert train(tmp_path / "run", "--resume", *absolute).code == 0


def test_training_with_another_mask_is_no_resume(ila, learn, train, tmp_path, contents):
    assert learn(tmp_path / "learned").code == 0
    mask = LayerMask.load(tmp_path / "learned")
    # Two masks that open as many layers of the same shapes.
    kinds = [name for name in mask.scores if name.endswith("mlp.up_proj")]
    for index, name in enumerate(kinds):
        gates = {n: n == name for n in mask.scores}
        LayerMask(mask.scores, gates).save(tmp_path / f"{index}.json")
    run = tmp_path / "run"
    assert train(run, "--mask", tmp_path / "0.json").code == 0
    before = contents(run)
    line = train(run, "--mask", tmp_path / "1.json", "--resume").error()
    assert "differs in open" in line
    assert "differs in open" in train(run, "--resume").error()
    assert contents(run) == before
    assert train(run, "--mask", tmp_path / "0.json", "--resume").code == 0


def copy_of(folder, other, **changes):
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    return other


def test_a_mask_of_another_model_with_the_same_layers_is_refused(
    ila, learn, train, tmp_path, tiny_model_folder
):
    assert learn(tmp_path / "learned").code == 0
    assert ila("select", tmp_path / "learned", "--top", "0.5").code == 0
    mask = tmp_path / "learned" / "mask-top-0.5.json"
    other = copy_of(tiny_model_folder, tmp_path / "other", intermediate_size=20)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    line = train(tmp_path / "run", "--mask", mask, "--model", other).error()
    for part in (str(mask), str(tiny_model_folder), str(other), "other names or sizes"):
        assert part in line
    assert not (tmp_path / "run").exists()
    # A chat model: its own weights and end-of-turn ids, the layers of its base.
    said = {"unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"}, "rms_norm_eps": 1e-3}
    said |= {"eos_token_id": [2, 3], "pad_token_id": 2, "initializer_range": 0.5}
    chat = copy_of(tiny_model_folder, tmp_path / "chat", **said, architectures=["Own"])
    assert train(tmp_path / "run", "--mask", mask, "--model", chat).code == 0
    # A mask from Python names no model: only its layer names can be checked.
    LayerMask(LayerMask.load(mask).scores).save(tmp_path / "bare.json")
    assert train(tmp_path / "bare", "--mask", tmp_path / "bare.json", "--model", other).code == 0


def test_the_frozen_prefix_is_shown_and_cached(ila, learn, train, tmp_path, tiny_model_folder):
    assert learn(tmp_path / "learned").code == 0
    mask = LayerMask.load(tmp_path / "learned")
    gates = {name: "layers.1." in name for name in mask.scores}
    LayerMask(mask.scores, gates).save(tmp_path / "top.json")
    options = ("--model", tiny_model_folder, "--mask", tmp_path / "top.json", "--rank", "2")
    answer = ila("explain", *options, "--tokens", "100", "--json", tmp_path / "layers.json")
    assert answer.code == 0 and "7 of 14 layers open, 7 in the frozen prefix" in answer.out
    found = json.loads((tmp_path / "layers.json").read_text())
    assert {row["module"] for row in found["layers"] if not row["in_prefix"]} == {
        name for name, is_open in gates.items() if is_open
    }
    # float32: x of width 16 in three places (q, k, v share one, gate and up another), gate and up
    # of width 24 in place of down_proj's x, t everywhere.
    assert found["saved_bytes"] == 100 * 4 * (16 * 3 + 2 * 24 + 2 * 7)
    top = ("--mask", tmp_path / "top.json", "--steps", "8", "--save-every", "0")
    cached = (*top, "--cache-prefix", "--cache-folder", tmp_path / "cache")
    assert train(tmp_path / "plain", *top).code == 0
    assert train(tmp_path / "cached", *cached).code == 0
    plain, with_cache = (
        json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("plain", "cached")
    )
    assert with_cache["prefix_cache"]["blocks"] == 1 and plain["prefix_cache"] is None
    assert (tmp_path / "cache" / "states" / "states.bin").is_file()
    for (_, one), (_, other) in zip(plain["losses"], with_cache["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    line = train(tmp_path / "none", "--cache-prefix").error()
    assert "there is none: the first block has an open layer" in line
    assert "give both" in train(tmp_path / "one", "--cache-folder", tmp_path / "cache").error()
    tight = (*cached, "--cache-folder", tmp_path / "other", "--cache-limit-gib", "1e-9")
    assert "exceed its limit" in train(tmp_path / "tight", *tight).error()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_run_is_left_alone(kind, learn, train, tmp_path):
    out = tmp_path / "mine"
    precious = out / "thesis.txt" if kind == "folder" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("years of work")
    for command in (learn, train):
        for options in ((), ("--resume",)):
            line = command(out, *options).error()
            assert str(out) in line and "not the folder of a run" in line
    assert precious.read_text() == "years of work"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [precious.name]


def test_an_empty_folder_is_free(learn, tmp_path):
    out = tmp_path / "deep" / "er"
    out.mkdir(parents=True)
    assert learn(out).code == 0
    assert learn(tmp_path / "new" / "one").code == 0


def test_a_damaged_description_is_one_clear_line(learn, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text('{"what": "le')
    line = learn(out, "--resume").error()
    assert "run.json is not JSON" in line


def test_export_and_report_write_over_nothing(ila, train, tmp_path):
    run, taken = tmp_path / "run", tmp_path / "taken"
    assert train(run).code == 0
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for merge in ((), ("--merge",)):
        line = ila("export", run, "--out", taken, *merge).error()
        assert line == f"error: {taken} exists and was left alone; give another folder"
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"]
    assert {p.name for p in tmp_path.iterdir()} == {"run", "taken"}
    for name in ("report.md", "report.png"):
        (taken / name).write_text("months of work")
        line = ila("report", run, "--out", taken).error()
        assert line == f"error: {taken / name} is not of `ila report` and was left alone; move it"
        assert (taken / name).read_text() == "months of work"
        (taken / name).unlink()
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"]


def test_a_report_is_brought_up_to_date(ila, train, tmp_path):
    run, out = tmp_path / "run", tmp_path / "report"
    assert train(run).code == 0
    assert ila("report", run, "--out", out).code == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"name": "renamed"}))
    assert ila("report", run, "--out", out).code == 0
    second = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(first) == set(second) == {"report.md", "report.png"}
    assert all(first[name] != second[name] for name in first)


def test_a_share_of_numpy_is_a_share(tmp_path):
    LayerMask({"a": 1.0, "b": 2.0}).save(tmp_path / "mask.json")
    cut, path = select(tmp_path, top=np.float32(0.5))
    assert path.name == "mask-top-0.5.json" and LayerMask.load(path).open == cut.open == ("b",)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model", "/nowhere/model"), "'/nowhere/model' is a path, but nothing is there"),
        (("--model", "nobody/nothing"), "'nobody/nothing' is not a local folder"),
        (("--model", "{empty}"), "no config.json or .gguf file"),
        (("--data", "/nowhere/rows.jsonl"), "/nowhere/rows.jsonl: no such file"),
        (("--data", "{empty}"), "must be a file or a hub id"),
        (("--data", "{tmp}/none.jsonl"), "none.jsonl: no rows in it"),
        (("--data", "{tmp}/broken.jsonl"), "broken.jsonl, line 2, column 2: not JSON"),
        (("--data", "{tmp}/mute.jsonl"), "all 11 were dropped, 11 without an answer"),
        (("--data", "{tmp}/alien.jsonl"), "alien.jsonl (to train on): row "),
        (("--data", "{tmp}/one.jsonl"), "held_out must leave rows on both sides"),
        (("--max-length", "3"), "no answer token within max_length=3"),
        (("--max-length", "1"), "max_length must be at least 2, got 1"),
        (("--target-modules", "nothing_proj"), "nothing_proj"),
        (("--target-modules", "q_proj,nothing_proj,"), "target_modules names 'nothing_proj'"),
        (("--rank", "0"), "rank must be ≥ 1, got 0"),
        (("--rank", "-4"), "rank must be ≥ 1, got -4"),
        (("--dropout", "1.0"), "dropout must be in [0, 1), got 1.0"),
        (("--held-out", "1"), "held_out must be in [0, 1), got 1.0"),
        (("--limit", "0"), "limit must be ≥ 1, got 0"),
        (("--dtype", "int8"), "dtype must be one of"),
        (("--split", "test"), "split must be 'train'"),
        (("--batch-size", "0"), "batch_size must be an integer ≥ 1, got 0"),
        (("--gradient-accumulation", "0"), "gradient_accumulation must be ≥ 1, got 0"),
        (("--learning-rate", "0"), "learning_rate must be positive, got 0.0"),
        (("--learning-rate", "nan"), "learning_rate must be positive, got nan"),
        (("--save-every", "-1"), "save_every must be None or ≥ 1, got -1"),
        (("--gguf-file", "a.gguf"), "gguf_file 'a.gguf' is not in folder"),
    ],
)
@pytest.mark.parametrize("command", ["learn", "train"])
def test_a_wrong_input_is_one_clear_line_and_no_folder(
    command, options, expected, learn, train, tmp_path
):
    files = {
        "none": "",
        "broken": '{"prompt": "a", "completion": "b"}\n{x}\n',
        "mute": '{"prompt": "a", "completion": ""}\n' * 12,
        "alien": '{"colour": 3}\n' * 12,
        "one": '{"prompt": "a", "completion": "b"}\n',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "empty").mkdir()
    filled = [text.format(empty=tmp_path / "empty", tmp=tmp_path) for text in options]
    out = tmp_path / "out"
    answer = (learn if command == "learn" else train)(out, *filled)
    assert expected in answer.error() and not out.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--top", "0"), "fraction must be in (0, 1], got 0.0"),
        (("--top", "1.5"), "fraction must be in (0, 1], got 1.5"),
        (("--top", "-0.3"), "fraction must be in (0, 1], got -0.3"),
        (("--top", "nan"), "fraction must be in (0, 1], got nan"),
        (("--freeze", "1"), "fraction must be in [0, 1), got 1.0"),
        (("--freeze", "0.99"), "closes all 2"),
        (("--top", "0.5", "--freeze", "0.5"), "exactly one of --top, --freeze and --budget"),
        ((), "exactly one of --top, --freeze and --budget"),
        (("--top", "0.5", "--out", "/nowhere/at/all.json"), "/nowhere/at"),
    ],
)
def test_a_wrong_selection_is_one_clear_line(options, expected, ila, tmp_path, contents):
    LayerMask({"a": 1.0, "b": 2.0}).save(tmp_path / "mask.json")
    before = contents(tmp_path)
    assert expected in ila("select", tmp_path, *options).error()
    assert contents(tmp_path) == before


def good():
    return {
        "format": "ila.layer_mask",
        "version": 1,
        "modules": {"a": {"score": 1.0, "open": True}},
        "provenance": {},
    }


MASKS = {
    "another model": (json.dumps(good()), "unknown here"),
    "truncated": (json.dumps(good())[:40], "not JSON, or cut short"),
    "empty": ("", "not JSON, or cut short"),
    "no JSON": ("PK\x03\x04", "not JSON, or cut short"),
    "another version": (json.dumps(good() | {"version": 2}), "expected version 1, got 2"),
    "NaN": (json.dumps(good()).replace("1.0", "NaN"), "NaN is not a JSON number"),
    "infinity": (json.dumps(good()).replace("1.0", "1e999"), "must be finite"),
    "all closed": (json.dumps(good()).replace("true", "false"), "all 1 are closed"),
    "other JSON": ('{"a": 1}', "expected an object with"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_wrong_mask_is_one_clear_line_and_no_folder(kind, train, ila, tmp_path):
    text, expected = MASKS[kind]
    file = tmp_path / "mask.json"
    file.write_text(text)
    assert expected in train(tmp_path / "out", "--mask", file).error()
    if kind != "another model":
        assert expected in ila("select", file, "--top", "0.5").error()
        assert expected in ila("compare", file, file).error()
    assert {p.name for p in tmp_path.iterdir()} == {"mask.json"}


def test_a_missing_mask_or_run_is_one_clear_line(ila, train, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "no such mask file" in train(tmp_path / "out", "--mask", nowhere).error()
    assert "no such mask file" in ila("select", nowhere, "--top", "0.5").error()
    assert "no such file" in ila("report", nowhere, "--out", tmp_path / "report").error()
    assert "has no run.json" in ila("export", nowhere, "--out", tmp_path / "e").error()
    assert "at least two runs to compare, got 1" in ila("compare", nowhere).error()
    assert not list(tmp_path.iterdir())


def test_masks_over_other_layers_are_not_compared(ila, tmp_path):
    LayerMask({"a": 1.0}).save(tmp_path / "a.json")
    LayerMask({"b": 1.0}).save(tmp_path / "b.json")
    line = ila(
        "compare", tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "c"
    ).error()
    assert "same 1 modules" in line and not (tmp_path / "c").exists()


def test_a_mask_of_equal_scores_is_compared_without_a_correlation(ila, tmp_path):
    LayerMask({"a": 1.0, "b": 1.0}).save(tmp_path / "flat.json")
    LayerMask({"a": 1.0, "b": 2.0}).save(tmp_path / "steep.json")
    answer = ila(
        *("compare", tmp_path / "flat.json", tmp_path / "steep.json"),
        *("--json", tmp_path / "c.json"),
    )
    assert answer.code == 0 and "none, equal" in answer.out
    (row,) = json.loads((tmp_path / "c.json").read_text())
    assert row["spearman"] is None


def test_a_run_of_another_kind_or_unfinished_is_not_exported(
    ila, learn, train, tmp_path, monkeypatch
):
    assert learn(tmp_path / "learned").code == 0
    line = ila("export", tmp_path / "learned", "--out", tmp_path / "e").error()
    assert "a run of `ila learn`, not of `ila train`" in line
    break_off(monkeypatch, 3)
    with pytest.raises(Killed):
        train(tmp_path / "run")
    line = ila("export", tmp_path / "run", "--out", tmp_path / "e").error()
    assert "no adapter_model.safetensors" in line and "is it finished?" in line
    assert (
        "metrics.json: no such file" in ila("report", tmp_path / "run", "--out", tmp_path).error()
    )
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_cut_short_is_one_clear_line(file, learn, tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    assert str(folder) in learn(tmp_path / "out", "--model", folder).error()
    assert not (tmp_path / "out").exists()


def test_an_adapter_cut_short_is_one_clear_line(ila, train, tmp_path):
    run = tmp_path / "run"
    assert train(run).code == 0
    weights = run / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = ila("export", run, "--out", tmp_path / "merged", "--merge").error()
    assert f"the adapter in {run} is damaged" in line
    assert not (tmp_path / "merged").exists()
    assert f"the adapter in {run} is damaged" in train(run, "--resume").error()


def test_a_loss_that_is_not_finite_is_one_clear_line(train, tmp_path, monkeypatch):
    original = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **k: original(*a, **k) * float("nan"))
    assert "the loss became nan at step 1" in train(tmp_path / "run").error()
    assert not (tmp_path / "run" / "metrics.json").exists()


# ---- a full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_selecting_keeps_the_old_mask(ila, tmp_path, monkeypatch, contents):
    LayerMask({"a": 1.0, "b": 2.0}).save(tmp_path / "mask.json")
    assert ila("select", tmp_path, "--top", "0.5").code == 0
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in ila("select", tmp_path, "--top", "0.5").error()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("merge", [(), ("--merge",)])
def test_a_full_disk_while_exporting_leaves_nothing(merge, ila, train, tmp_path, monkeypatch):
    assert train(tmp_path / "run").code == 0
    monkeypatch.setattr(os, "fsync", full)
    assert (
        "No space left" in ila("export", tmp_path / "run", "--out", tmp_path / "e", *merge).error()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("call", [1, 2, 3])  # a checkpoint of either stage, the adapter between
def test_a_full_disk_while_learning_can_be_resumed(call, learn, tmp_path, monkeypatch, contents):
    assert learn(tmp_path / "whole").code == 0
    calls, original = [], PeftModel.save_pretrained

    def save(*args, **kwargs):
        calls.append(1)
        return full() if len(calls) == call else original(*args, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    assert "No space left" in learn(tmp_path / "run").error()
    assert not (tmp_path / "run" / "mask.json").exists()
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".ila-tmp")]
    assert learn(tmp_path / "run", "--resume").code == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


# ---- safety and help


def test_code_of_a_model_is_off_unless_the_option_is_given(learn, tmp_path):
    assert learn(tmp_path / "run").code == 0
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]["trust_remote_code"]
        is False
    )


@pytest.mark.parametrize(
    "command",
    ["learn", "select", "measure", "train", "explain", "compare", "report", "export", "demo"],
)
def test_every_command_explains_itself(command, ila):
    answer = ila(command, "--help")
    assert answer.code == 0 and f"ila {command}" in answer.out


def test_select_by_blocks_opens_another_set_and_says_so(ila, tmp_path):
    scores = {"layers.0.q_proj": 4.0, "layers.0.k_proj": 3.0, "layers.1.q_proj": 2.0}
    LayerMask(scores).save(tmp_path / "mask.json")
    opened = {}
    for objective in ("layers", "blocks"):
        out = tmp_path / f"{objective}.json"
        asked = ("--top", "0.6", "--objective", objective, "--out", out)
        assert ila("select", tmp_path / "mask.json", *asked).code == 0
        opened[objective] = LayerMask.load(out)
    assert opened["layers"].open == ("layers.0.q_proj", "layers.0.k_proj")
    assert opened["blocks"].open == ("layers.0.q_proj", "layers.1.q_proj")
    assert dict(opened["blocks"].scores) == scores
    assert opened["blocks"].provenance["selection"]["objective"] == "blocks"
    wrong = ila("select", tmp_path / "mask.json", "--top", "0.6", "--objective", "rows")
    assert "objective must be one of" in wrong.error()


@pytest.mark.parametrize("arguments", [("nonsense",), ("select",), ("learn", "--steps", "x")])
def test_a_wrong_call_exits_with_2(arguments, ila):
    assert ila(*arguments).code == 2


def test_fresh_does_not_remove_what_is_no_demo(ila, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert (
        "not the folder of a run and was left alone"
        in ila("demo", "--fresh", "--out", tmp_path).error()
    )
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert "steps must be ≥ 8, got 0" in ila("demo", "--steps", "0", "--out", tmp_path).error()


def test_learn_full_scores_the_weights_and_its_mask_trains_them(ila, source, tmp_path):
    plain = source[:-2]  # without a rank
    found, run = tmp_path / "found", tmp_path / "run"
    steps = ("--stage1-steps", 4, "--stage2-steps", 5, "--batch-size", 2)
    answer = ila("learn", *plain, *steps, "--full", "--out", found)
    assert answer.code == 0, answer.err
    names = {path.name for path in found.iterdir()}
    assert names == {
        "mask.json", "heatmap.png", "log.jsonl", "run.json", "search.json", "stage1.json",
        "cost.json", "config.yaml",
    }  # fmt: skip
    mask = LayerMask.load(found)
    assert mask.provenance["full"] and mask.provenance["search"]["config"]["learning_rate"] == 2e-5
    assert len(set(mask.scores.values())) == 14
    assert ila("select", found, "--top", "0.3").code == 0
    chosen = found / "mask-top-0.3.json"
    answer = ila("train", *plain, "--full", "--mask", chosen, "--steps", 2, "--out", run)
    assert answer.code == 0 and "4 of 14" in answer.out, answer.err
    line = ila("learn", *source, *steps, "--full", "--out", tmp_path / "x").error()
    assert "--rank does nothing here: --full trains no adapter" in line
    lora = ("--learning-rate", 2e-5, "--out", found, "--resume")
    assert "differs in adapter" in ila("learn", *plain, *steps, *lora).error()

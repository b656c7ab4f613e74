"""What libraries raise over a user's files and options: one line, exit code 2, nothing written."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Trainer

from ila.masks.mask import LayerMask
from ila.runs.lock import LOCK_FILE
from tests.cli.whole_files import Killed, write_gguf

REPOSITORY = Path(__file__).resolve().parents[2]


def copy_of(folder: Path, other: Path, **changes) -> Path:
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    return other


@pytest.fixture
def kill_at(monkeypatch):
    """Return what makes a later training step die as by a kill."""

    def at(call: int) -> None:
        calls, original = [], Trainer.training_step

        def step(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                monkeypatch.setattr(Trainer, "training_step", original)
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", step)

    return at


# ---- models


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": "1e-05"}, "model"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 20,000, got 1e+09"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be at most 20,000"),
        ({"num_hidden_layers": 3}, "the weights of model"),
        ({"hidden_size": 2**40}, "model"),
        ({"vocab_size": 10**9}, "no more parameters than its weights hold"),
        ({"num_attention_heads": 0}, "model"),
        ({"rms_norm_eps": float("nan")}, "must have a finite loss, got nan"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"architectures": 5}, None),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "nonsense"),
        ({"attention_dropout": 7}, "model"),
        ({"quantization_config": {"quant_method": "nonsense"}}, None),
    ],
)
def test_a_damaged_configuration_is_one_clear_line(
    changes, said, train, tmp_path, tiny_model_folder
):
    model = copy_of(tiny_model_folder, tmp_path / "model", **changes)
    begin = time.monotonic()
    answer = train(tmp_path / "out", "--model", model)
    assert time.monotonic() - begin < 30
    if said is not None or answer.code:
        line = answer.error()
        assert (said or "") in line and str(model) in line and not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_embedding_is_one_clear_line(
    train, tmp_path, tiny_model_folder
):
    model = copy_of(tiny_model_folder, tmp_path / "model", vocab_size=8)
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:8].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = train(tmp_path / "out", "--model", model).error()
    assert "must give ids below 8" in line and not (tmp_path / "out").exists()


def test_weights_that_lack_are_not_drawn_at_random(ila, tmp_path, tiny_model_folder):
    model = copy_of(tiny_model_folder, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = ila("explain", "--model", model).error()
    assert "1 lack, such as model.layers.1.mlp.up_proj.weight" in line


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.8, 0.95, 0.999])
def test_a_gguf_file_cut_anywhere_is_one_clear_line(share, ila, tmp_path):
    file = tmp_path / "packed" / "model.gguf"
    write_gguf(file)
    assert ila("explain", "--model", file, "--rank", "2").code == 0
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert str(tmp_path / "packed") in ila("explain", "--model", file).error()


@pytest.mark.parametrize("template", ["{{ nothing.at.all }}", "{% for %}", "{{ 'a' * 10**14 }}"])
def test_a_template_that_fails_is_one_clear_line(
    template, train, tmp_path, tiny_model_folder, data
):
    model = copy_of(tiny_model_folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    assert str(data) in train(tmp_path / "out", "--model", model).error()
    assert not (tmp_path / "out").exists()


# ---- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target-modules", ".*(q_proj"), "target_modules must be all-linear, names with commas"),
        (("--target-modules", "*"), "target_modules must be"),
        (("--target-modules", ""), "target_modules"),
        (("--alpha", "nan"), "alpha must be positive and finite, got nan"),
        (("--alpha", "inf"), "alpha must be positive and finite, got inf"),
        (("--alpha", "0"), "alpha must be positive"),
        (("--alpha", "-1"), "alpha must be positive"),
        (("--rank", str(10**30)), "rank must be at most 65536"),
        (("--seed", "-1"), "seed must be in [0, 2³²), got -1"),
        (("--seed", str(2**32)), "seed must be in [0, 2³²)"),
        (("--dropout", "nan"), "dropout must be in [0, 1), got nan"),
        (("--held-out", "nan"), "held_out must be in [0, 1), got nan"),
    ],
)
@pytest.mark.parametrize("command", ["learn", "train"])
def test_a_wrong_option_is_one_clear_line(command, options, said, learn, train, tmp_path):
    answer = (learn if command == "learn" else train)(tmp_path / "out", *options)
    assert said in answer.error() and not (tmp_path / "out").exists()


def test_a_regular_expression_may_hold_a_comma(train, tmp_path):
    answer = train(
        tmp_path / "out", "--target-modules", r".*layers\.[0-9]{1,2}\.mlp\.(up|down)_proj"
    )
    assert answer.code == 0 and "4 of 4" in answer.out


@pytest.mark.parametrize("name", ["[v2]", "a[x]", "[/c]", "[bold]b", "$x$ [red]"])
def test_brackets_in_a_path_are_printed_as_they_are(name, ila, train, tmp_path):
    run = tmp_path / name
    answer = train(run)
    assert answer.code == 0, answer.err
    assert f"Adapter in {run};" in answer.out
    assert str(run) in train(run).error()
    assert f"in {tmp_path / name / 'e'}" in ila("export", run, "--out", run / "e").out
    assert name in ila("report", run, "--out", tmp_path / "report" / name).out


def test_a_path_of_unbalanced_markup_is_one_clear_line(train, tmp_path):
    out = tmp_path / "a[x" / "b[" / "c]"
    out.parent.mkdir(parents=True)
    out.write_text("years of work")
    assert str(out) in train(out).error()


# ---- masks, rates, runs


@pytest.fixture
def learned(learn, tmp_path):
    assert learn(tmp_path / "learned").code == 0
    return tmp_path / "learned"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rank", 10**30, "rank must be an integer in [1, 2³¹) or null"),
        ("rank", "8", "rank must be"),
        ("load_in", "16bit", "load_in must be one of"),
        ("model", 5, "model must be a text"),
        ("max_length", [1], "max_length must be"),
        ("dropout", "x", "dropout must be"),
        ("gguf_file", {}, "gguf_file must be"),
    ],
)
def test_an_odd_provenance_is_one_clear_line(field, value, said, ila, learned):
    document = json.loads((learned / "mask.json").read_text())
    document["provenance"]["inputs"][field] = value
    (learned / "mask.json").write_text(json.dumps(document))
    line = ila("select", learned, "--budget", "parameters=1k").error()
    assert said in line and str(learned) in line


RATES = {
    "format": "ila.speed", "version": 1, "fixed_ms": 1.0, "per_flop_ms": 1e-9, "per_byte_ms": 1e-9,
    "per_layer_ms": 0.1, "per_label_ms": 0.0, "worst_error": 0.1,
    "measured": {"device": "cpu", "rows": 2, "length": 16, "rank": 2},
}  # fmt: skip
NO_RATES = dict.fromkeys(("per_flop_ms", "per_byte_ms", "per_layer_ms"), 0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"measured": None}, "measured must be an object"),
        ({"measured": {}}, "missing device"),
        ({"fixed_ms": float("inf")}, "fixed_ms must be a finite number"),
        ({"per_flop_ms": None}, "per_flop_ms must be"),
        ({"per_flop_ms": -1.0}, "per_flop_ms must be"),
        ({"fixed_ms": "1"}, "fixed_ms must be"),
        (NO_RATES, "all rates are 0"),
        (NO_RATES | {"fixed_ms": 0.0}, "all rates are 0"),
        ({"measured": RATES["measured"] | {"rows": 10**30}}, "rows must be"),
        ({"measured": RATES["measured"] | {"model": 3}}, None),
    ],
)
def test_odd_rates_are_one_clear_line(changes, said, ila, learned, tmp_path):
    file = tmp_path / "speed.json"
    file.write_text(json.dumps(RATES | changes))
    answer = ila("select", learned, "--budget", "time=0.9", "--speed", file)
    assert answer.code == 0 if said is None else said in answer.error()
    assert said is None or str(file) in answer.error()


@pytest.mark.parametrize("content", ['{"r": ', '{"r": "x"', "[]", '{"peft_type": "NOPE"}', "\xff"])
@pytest.mark.parametrize("merge", [(), ("--merge",)])
def test_a_damaged_adapter_configuration_is_one_clear_line(content, merge, ila, train, tmp_path):
    run = tmp_path / "run"
    assert train(run).code == 0
    (run / "adapter_config.json").write_text(content, encoding="latin-1")
    line = ila("export", run, "--out", tmp_path / "e", *merge).error()
    assert str(run / "adapter_config.json") in line and not (tmp_path / "e").exists()


def test_an_adapter_that_lacks_tensors_is_not_merged(ila, train, tmp_path):
    run = tmp_path / "run"
    assert train(run).code == 0
    weights = load_file(run / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "damaged" in ila("export", run, "--merge", "--out", tmp_path / "e").error()
    assert "damaged" in train(run, "--resume").error()


@pytest.mark.parametrize("line", ["5", "null", "[1]", '"x"', '{"step": "x"}', "{", "\udcff", "{}"])
def test_a_log_with_an_odd_line_is_gone_on_with(line, train, tmp_path, kill_at):
    run = tmp_path / "run"
    kill_at(4)
    with pytest.raises(Killed):
        train(run)
    with (run / "log.jsonl").open("a", encoding="utf-8", errors="surrogateescape") as log:
        log.write(f"{line}\n")
    assert train(run, "--resume").code == 0
    steps = [json.loads(one) for one in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", ["{}", "[]", '{"held_out_loss_before": "x"}', "{", "5"])
def test_a_damaged_loss_before_is_one_clear_line(content, train, tmp_path, kill_at, contents):
    run = tmp_path / "run"
    kill_at(4)
    with pytest.raises(Killed):
        train(run)
    (run / "before.json").write_text(content)
    before = contents(run)
    assert str(run / "before.json") in train(run, "--resume").error()
    assert contents(run) == before


def test_a_run_whose_loss_before_is_unknown_is_gone_on_with(train, tmp_path, kill_at):
    run = tmp_path / "run"
    kill_at(4)
    with pytest.raises(Killed):
        train(run)
    (run / "before.json").write_text('{"held_out_loss_before": null}')
    assert train(run, "--resume").code == 0
    assert "Loss on held-out rows: – → " in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("part", "said"),
    [("config", "search.config"), ("stage1", "search.stage1"), ("spread", "search.spread")],
)
def test_a_finished_mask_that_lacks_its_search_is_one_clear_line(part, said, learn, learned):
    document = json.loads((learned / "mask.json").read_text())
    document["provenance"]["search"][part] = {"x": 1}
    (learned / "mask.json").write_text(json.dumps(document))
    assert said in learn(learned, "--resume").error()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors"])
def test_a_checkpoint_with_a_flipped_bit_is_passed_over(file, train, tmp_path, kill_at):
    run = tmp_path / "run"
    kill_at(4)
    with pytest.raises(Killed):
        train(run)
    content = bytearray((run / "checkpoints" / "checkpoint-2" / file).read_bytes())
    content[len(content) // 2] ^= 8
    (run / "checkpoints" / "checkpoint-2" / file).write_bytes(content)
    assert train(run, "--resume").code == 0
    assert train(tmp_path / "whole").code == 0
    ours, theirs = (
        json.loads((folder / "metrics.json").read_text())["losses"]
        for folder in (run, tmp_path / "whole")
    )
    assert ours == theirs


# ---- the machine


@pytest.mark.parametrize("limit", [500, 4000, 9000, 12_000])
def test_a_limit_on_the_size_of_files_is_one_clear_line(limit, train, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        answer = train(tmp_path / "run", "--rank", "8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = answer.error()
    assert "File too large" in line or "could not be written" in line
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_no_memory_during_a_save_is_one_clear_line(train, tmp_path, monkeypatch):
    def save(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "save", save)
    assert "MemoryError" in train(tmp_path / "run").error()


def test_a_bug_of_ours_prints_where_it_is_and_exits_with_1(train, tmp_path, monkeypatch):
    monkeypatch.setattr("ila.commands.inputs.versions", lambda: {}["a"])
    answer = train(tmp_path / "run")
    assert answer.code == 1 and "Traceback" in answer.err and "KeyError" in answer.err
    assert "please report it" in answer.err and not (tmp_path / "run").exists()


# ---- runs and folders


def test_the_package_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "ila", "compare", "nowhere"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == "error: give at least two runs to compare, got 1\n"


HOLDER = """
import sys, time
from pathlib import Path
from ila.runs.lock import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("command", ["learn", "train"])
def test_a_run_beside_the_running_one_is_refused(command, learn, train, tmp_path, contents):
    run, verb = tmp_path / "run", learn if command == "learn" else train
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"owned\n"
        before = contents(run)
        for options in ((), ("--resume",)):
            assert "is being written by another process" in verb(run, *options).error()
        assert contents(run) == before
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert verb(run, "--resume").code == 0
    assert not (run / LOCK_FILE).exists()


@pytest.mark.parametrize("command", ["learn", "train"])
def test_leftovers_are_swept_by_who_finishes_the_run(command, learn, train, tmp_path, kill_at):
    run, verb = tmp_path / "run", learn if command == "learn" else train
    kill_at(4)
    with pytest.raises(Killed):
        verb(run)
    (run / ".ila-tmp-0123456789abcdef").mkdir()
    (run / ".ila-tmp-0123456789abcdef" / "adapter_model.safetensors").write_text("half")
    assert verb(run, "--resume").code == 0
    assert not [path for path in run.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("command", ["learn", "train"])
def test_what_other_libraries_log_is_kept(command, learn, train, tmp_path, monkeypatch):
    original = Trainer.training_step

    def step(self, *args, **kwargs):
        file = Path(self.args.output_dir) / "runs" / "here" / "events.out"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("curves")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    run = tmp_path / "run"
    assert (learn if command == "learn" else train)(run).code == 0
    stages = ("stage1", "stage2") if command == "learn" else (".",)
    for stage in stages:
        assert (run / "logs" / stage / "runs" / "here" / "events.out").read_text() == "curves"
    assert not (run / "checkpoints").exists() and not (run / "stage1").exists()


@pytest.mark.parametrize("method", ["ila", "path", "gate_gradient"])
def test_a_search_without_held_out_rows_shows_a_dash(method, learn, tmp_path):
    answer = learn(tmp_path / "run", "--held-out", "0", "--method", method)
    assert answer.code == 0, answer.err
    assert "held out – → –" in answer.out
    held = LayerMask.load(tmp_path / "run").provenance["held_out_loss"]
    assert held["before"] is None and held["rows"] == 0


def test_an_adapter_has_a_filled_card_and_its_tokenizer(learn, train, tmp_path, tiny_model_folder):
    assert train(tmp_path / "run").code == 0 and learn(tmp_path / "found").code == 0
    for folder in (tmp_path / "run", tmp_path / "found" / "adapter"):
        card = (folder / "README.md").read_text()
        assert "More Information Needed" not in card and str(tiny_model_folder) in card
        assert "rank 2" in card
    assert "14 of 14 layers were trained" in (tmp_path / "run" / "README.md").read_text()
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "run", tiny_model_folder))
    assert ours("a b c")["input_ids"] == theirs("a b c")["input_ids"]


def test_bars_are_drawn_on_stderr_alone(ila, tmp_path, tiny_model_folder):
    options = ("--rank", "2", "--batch-size", "1", "--max-length", "8", "--rounds", "1")
    answer = ila("measure", "--model", tiny_model_folder, *options, "--out", tmp_path / "s.json")
    assert answer.code == 0 and "Rounds of steps" not in answer.out

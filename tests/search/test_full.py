"""Full fine-tuning of chosen layers: open weights alone are trained, and alone are kept."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import ila
from ila.masks.mask import LayerMask
from ila.models.edit import masked_layers
from ila.models.open_weights import (
    CHANGED_FILE,
    OpenLayers,
    OpenLinear,
    load_changed,
    open_layers,
)
from ila.runs.metrics import load_run
from ila.training.config import TrainConfig
from ila.training.train import train

TARGETS = ["q_proj", "o_proj", "down_proj"]
OPEN = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def base(tiny_model_folder):
    """Return a loader of the tiny Llama of two blocks."""
    return lambda dtype=torch.float32: LlamaForCausalLM.from_pretrained(
        tiny_model_folder, dtype=dtype
    )


@pytest.fixture
def opened(base):
    """Return a maker of the model with two layers of six open."""

    def make(dtype=torch.float32):
        model = ila.attach(base(dtype), LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
        names = list(masked_layers(model, "default"))
        gates = {name: name.removeprefix("base_model.model.") in OPEN for name in names}
        return open_layers(model, LayerMask(dict.fromkeys(names, 1.0), gates))

    return make


@pytest.fixture
def rows():
    ids = [[1, *(7 + (3 * i + j) % 30 for j in range(9))] for i in range(8)]
    return [{"input_ids": row, "labels": row} for row in ids]


def with_ordinary_layers(opened: OpenLayers) -> torch.nn.Module:
    """Return the model of a training as its base is: plain layers in the base's dtypes."""
    for name in opened.names:
        opened.model.get_submodule(name).__class__ = torch.nn.Linear
    for name, dtype in opened.dtypes.items():
        parameter = opened.model.get_parameter(name).requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return opened.model


CONFIG = TrainConfig(steps=6, learning_rate=1e-2, batch_size=4, save_every=2)


def test_only_the_open_layers_are_there_to_train(opened, base):
    layers = opened()
    model = layers.model
    assert layers.names == OPEN and layers.total == 6
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.weight" for name in OPEN}
    assert {n for n, m in model.named_modules() if type(m) is OpenLinear} == set(OPEN)
    assert list(model.state_dict()) == list(base().state_dict())
    assert layers.counts() == {
        "open_modules": 2,
        "total_modules": 6,
        "fraction_open": 1 / 3,
        "trainable_parameters": 16 * 16 + 24 * 16,
        "full": True,
    }


def test_the_loss_and_gradients_are_those_of_the_unfrozen_base(opened, base):
    ids = torch.arange(24).view(2, 12) + 6
    model, plain = opened().model, base()
    for name in OPEN:
        assert plain.get_parameter(f"{name}.weight").requires_grad
    for one in (model, plain):
        one.train()(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        expected = plain.get_parameter(name).grad
        assert parameter.grad is None if name[:-7] not in OPEN else parameter.grad.equal(expected)


def test_training_changes_the_open_weights_and_nothing_else(opened, base, rows, tmp_path):
    layers, start = opened(), base()
    metrics = train(
        layers, rows, CONFIG, held_out=rows, output_dir=tmp_path / "run", progress=False
    )
    assert metrics["full"] and metrics["held_out_loss"] < metrics["held_out_loss_before"]
    assert metrics == load_run(tmp_path / "run") and metrics["open_modules"] == 2
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {CHANGED_FILE, "metrics.json", "train.json", "log.jsonl"}
    saved = load_file(tmp_path / "run" / CHANGED_FILE)
    assert set(saved) == {f"{name}.weight" for name in OPEN}
    trained = with_ordinary_layers(layers)
    delta = {n: (p - start.get_parameter(n)).abs().max() for n, p in trained.named_parameters()}
    assert {n for n, change in delta.items() if change > 0} == set(saved)
    again = base()
    load_changed(again, tmp_path / "run")
    state = trained.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in again.state_dict().items())


def test_bf16_weights_move_by_less_than_bf16_can_hold(opened, base, rows, tmp_path):
    """Six steps of 1e-5 each: in bf16 a weight of 0.2 would stay where it is."""
    layers = opened(torch.bfloat16)
    config = TrainConfig(steps=6, learning_rate=1e-5, batch_size=4, save_every=None)
    train(layers, rows, config, output_dir=tmp_path, progress=False)
    start = base(torch.bfloat16)
    for name in OPEN:
        weight = layers.model.get_parameter(f"{name}.weight")
        change = (weight - start.get_parameter(f"{name}.weight").float()).abs()
        assert weight.dtype == torch.float32 and 1e-6 < change.median() < 6e-5
    assert {t.dtype for t in load_file(tmp_path / CHANGED_FILE).values()} == {torch.bfloat16}


class Killed(BaseException):
    """A kill: nothing that catches `Exception` sees it."""


def test_a_resumed_run_ends_where_an_unbroken_one_does(opened, rows, tmp_path, monkeypatch):
    whole = train(opened(), rows, CONFIG, output_dir=tmp_path / "whole", progress=False)

    from ila.training.callbacks import LogFile

    write, broken = LogFile.write, tmp_path / "broken"

    def write_until(self, **entry):
        if entry["step"] == 5:
            raise Killed
        write(self, **entry)

    monkeypatch.setattr(LogFile, "write", write_until)
    with pytest.raises(Killed):
        train(opened(), rows, CONFIG, output_dir=broken, progress=False)
    monkeypatch.undo()
    (checkpoint,) = (broken / "checkpoints").glob("checkpoint-4")
    assert (checkpoint / CHANGED_FILE).is_file()
    assert not list(checkpoint.glob("model*.safetensors")), "a checkpoint of the whole model"
    resumed = train(opened(), rows, CONFIG, output_dir=broken, resume=True, progress=False)
    assert resumed["losses"] == whole["losses"]
    one, other = (load_file(folder / CHANGED_FILE) for folder in (tmp_path / "whole", broken))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())

    layers = opened()
    finished = train(layers, rows, CONFIG, output_dir=broken, resume=True, progress=False)
    assert finished["losses"] == whole["losses"]
    assert all(layers.model.get_parameter(name).equal(tensor) for name, tensor in one.items())


def test_mistakes_are_named_and_change_nothing(opened, base, rows, tmp_path):
    train(opened(), rows, CONFIG, output_dir=tmp_path, progress=False)
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model must be the one that was trained: model.layers"):
        load_changed(other, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no changed.safetensors: is it finished"):
        load_changed(base(), tmp_path / "nowhere")
    whole = (tmp_path / CHANGED_FILE).read_bytes()
    (tmp_path / CHANGED_FILE).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"changed\.safetensors are damaged"):
        load_changed(base(), tmp_path)
    tied = base()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    model = ila.attach(tied, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head' must not share its weight"):
        open_layers(model)
    assert "lm_head" in str(ila.explain(model)), "the adapter is still there"


def test_a_packed_layer_has_no_weight_to_train(tiny_model_folder):
    pytest.importorskip("bitsandbytes")
    from ila.models.loading import find_source, load_model

    packed = load_model(find_source(str(tiny_model_folder)), load_in="4bit")
    model = ila.attach(packed, LoraConfig(target_modules=TARGETS))
    with pytest.raises(
        ValueError, match=r"must be a plain nn.Linear to train its weight, got Linear4bit"
    ):
        open_layers(model)


def test_the_command_trains_reports_and_exports(tiny_model_folder, tmp_path, monkeypatch, capsys):
    from ila import cli

    letters = "abcdefghijklmnopqrstuvwxyz"
    data = tmp_path / "letters.jsonl"
    pairs = [(" ".join(letters[i : i + 3]), " ".join(letters[i + 3 : i + 8])) for i in range(12)]
    lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs]
    data.write_text("".join(lines))

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["ila", *map(str, arguments)])
        monkeypatch.setattr(cli, "screen", cli.Console(width=200))
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    names = list(
        masked_layers(
            ila.attach(
                LlamaForCausalLM.from_pretrained(tiny_model_folder),
                LoraConfig(target_modules="all-linear"),
            ),
            "default",
        )
    )
    mask = LayerMask({name: float(i) for i, name in enumerate(names)}).top(0.3)
    mask.save(tmp_path / "mask.json")
    common = ("--model", tiny_model_folder, "--data", data, "--mask", tmp_path / "mask.json")
    common += ("--steps", 4, "--batch-size", 2)
    full, lora = tmp_path / "full", tmp_path / "lora"
    code, said = run("train", *common, "--full", "--learning-rate", 0.01, "--out", full)
    assert code == 0 and "Changed weights in" in said and "4 of 14" in said, said
    assert run("train", *common, "--out", lora)[0] == 0
    code, said = run("train", *common, "--out", full, "--resume")
    assert code == 2 and "holds a run that differs in full" in said
    code, said = run("report", full, lora, "--out", tmp_path / "report")
    assert code == 0 and "full" in said and "lora" in said
    for option, value in (("--rank", 4), ("--load-in", "4bit")):
        code, said = run("train", *common, "--full", option, value, "--out", tmp_path / "x")
        assert code == 2 and f"{option} does nothing here: --full trains no adapter" in said

    code, said = run("export", full, "--out", tmp_path / "plain")
    assert code == 0 and {p.name for p in (tmp_path / "plain").iterdir()} == {
        CHANGED_FILE,
        "run.json",
    }
    code, said = run("export", full, "--merge", "--out", tmp_path / "model")
    assert code == 0 and "Model with the changed weights" in said, said
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    before = LlamaForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    changed = {name for name, t in model.state_dict().items() if not t.equal(before[name])}
    prefix = "base_model.model."
    assert changed == {f"{name.removeprefix(prefix)}.weight" for name in mask.open}
    assert (tmp_path / "model" / "tokenizer.json").is_file()

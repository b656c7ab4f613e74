"""``--config``, ``--set`` and the options for Trainer: one file runs learn, select and train."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import Trainer

from ila.commands.option_tables import FIELDS, RUN, SEARCH, TRAIN, TRAINER
from ila.masks.mask import LayerMask
from ila.models.checkpointing import PrefixAware
from ila.runs.metrics import load_run
from ila.training.config import TrainConfig
from tests.cli.conftest import TRAIN as SHORT

ONE_FILE = """
model: {model}
data: {data}
rank: 2
batch-size: 2          # a dash or an underscore
learning_rate: 1e-2    # text for YAML 1.1, a number for us
scheduler: cosine
gradient_checkpointing: true
weight_decay: 1e-3
report_to: tensorboard
eval_every: 2
held_out: 0.25
max_grad_norm: 0.5

learn:
  method: ila
  stage1_steps: 4
  stage2_steps: 5
  out: {root}/search
select:
  run: {root}/search
  top: 0.3
  out: {root}/mask.json
train:
  mask: {root}/mask.json
  steps: 6
  warmup: 0.5
  out: {root}/trained
"""


@pytest.fixture
def file(tmp_path, tiny_model_folder, data) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(ONE_FILE.format(model=tiny_model_folder, data=data, root=tmp_path))
    return path


@pytest.fixture
def without_reports(file) -> Path:
    file.write_text(file.read_text().replace("report_to: tensorboard\n", ""))
    return file


@pytest.fixture
def args_seen(monkeypatch) -> list:
    """Record the arguments and the model of every Trainer that trains."""
    seen, original = [], Trainer.train

    def train(self, *args, **kwargs):
        seen.append((self.args, self.model))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    return seen


def log_of(folder: Path, stage: str, key: str) -> list[list[float]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [[e["step"], e[key]] for e in entries if e["stage"] == stage and key in e]


def scalars(folder: Path) -> dict[str, list[list[float]]]:
    """Read TensorBoard's files below a folder: name -> [step, value]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[list[float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend([e.step, e.value] for e in events.Scalars(name))
    return found


def test_one_file_runs_learn_select_and_train(file, ila, tmp_path, args_seen):
    pytest.importorskip("tensorboard")
    for verb in ("learn", "select", "train"):
        answer = ila(verb, "--config", file)
        assert answer.code == 0, answer.err
    search, trained = tmp_path / "search", tmp_path / "trained"
    (stage1, _), (stage2, _), (train, _) = args_seen
    for args in (stage1, train):
        assert args.lr_scheduler_type == "cosine" and args.weight_decay == 1e-3
        assert args.max_grad_norm == 0.5 and args.gradient_checkpointing
    assert stage2.lr_scheduler_type == "constant" and stage2.weight_decay == 0.0
    assert stage2.gradient_checkpointing and stage2.eval_strategy == "no"
    assert train.warmup_steps == 0.5 and train.learning_rate == 1e-2

    metrics = load_run(trained)
    assert metrics["open_modules"] == 4
    evaluations = log_of(trained, "train", "held_out_loss")
    assert [step for step, _ in evaluations] == [2, 4, 6] and evaluations == metrics["evaluations"]
    # The last one is measured as the loss after the training is.
    assert evaluations[-1][1] == metrics["held_out_loss"] != metrics["held_out_loss_before"]
    in_mask = json.loads((search / "mask.json").read_text())["provenance"]
    assert in_mask["search"]["stage1"]["evaluations"] == log_of(search, "stage1", "held_out_loss")
    assert (
        in_mask["held_out_loss"]["after_stage1"] == log_of(search, "stage1", "held_out_loss")[-1][1]
    )

    written = scalars(trained / "logs")
    single = pytest.approx  # TensorBoard keeps 32 bits
    assert written["train/loss"] == [[s, single(v, rel=1e-6)] for s, v in metrics["losses"]]
    assert written["eval/loss"] == [[s, single(v, rel=1e-6)] for s, v in evaluations]
    rates = [value for _, value in written["train/learning_rate"]]
    assert rates.index(max(rates)) == 3 and max(rates) == single(1e-2)  # half of six steps
    assert set(scalars(search / "logs" / "stage1")) >= {"train/loss", "eval/loss"}
    assert not list(trained.rglob("checkpoint*"))


def test_the_written_options_run_again_to_the_same_losses(without_reports, ila, tmp_path):
    first, second = tmp_path / "trained", tmp_path / "again"
    assert ila("learn", "--config", without_reports).code == 0
    assert ila("select", "--config", without_reports).code == 0
    assert ila("train", "--config", without_reports).code == 0
    answer = ila("train", "--config", first / "config.yaml", "--out", second)
    assert answer.code == 0, answer.err
    assert load_run(second)["losses"] == load_run(first)["losses"]
    assert (second / "config.yaml").read_bytes() == (first / "config.yaml").read_bytes()
    settings = yaml.safe_load((first / "config.yaml").read_text())
    assert settings["lr_scheduler_type"] == "cosine" and settings["steps"] == 6
    again = ila("train", "--config", first / "config.yaml", "--out", first, "--resume")
    assert again.code == 0, again.err
    search = tmp_path / "search"
    relearned = ila("learn", "--config", search / "config.yaml", "--out", tmp_path / "relearned")
    assert relearned.code == 0, relearned.err
    assert LayerMask.load(tmp_path / "relearned").scores == LayerMask.load(search).scores


def test_options_win_over_the_file_and_a_block_over_its_top(
    without_reports, ila, tmp_path, args_seen
):
    text = without_reports.read_text().replace("  mask: ", "  weight_decay: 0.25\n  # mask: ")
    without_reports.write_text(text)
    given = ("--scheduler", "linear", "--steps", 2, "--rank", 1, "--set", "max_grad_norm=2.5")
    answer = ila("train", "--config", without_reports, *given, "--no-gradient-checkpointing")
    assert answer.code == 0, answer.err
    ((args, model),) = args_seen
    assert args.lr_scheduler_type == "linear" and args.max_steps == 2
    assert args.weight_decay == 0.25 and args.max_grad_norm == 2.5
    assert not args.gradient_checkpointing and model.peft_config["default"].r == 1


def test_a_run_with_a_selection_takes_the_file_too(without_reports, ila, tmp_path):
    text = without_reports.read_text().replace("mask:", "select-at: 0.5\n  top: 0.3\n  # mask:")
    without_reports.write_text(text)
    answer = ila("train", "--config", without_reports)
    assert answer.code == 0, answer.err
    metrics = load_run(tmp_path / "trained")
    assert metrics["open_modules"] == 4
    evaluations = log_of(tmp_path / "trained", "train", "held_out_loss")
    assert evaluations == metrics["evaluations"] and [e[0] for e in evaluations] == [2, 4, 6]


def test_checkpointing_leaves_the_frozen_prefix_alone(train, learn, ila, tmp_path, args_seen):
    assert learn(tmp_path / "search").code == 0
    found = LayerMask.load(tmp_path / "search")
    gates = {name: ".layers.1." in name for name in found.scores}
    LayerMask(found.scores, gates, dict(found.provenance)).save(tmp_path / "upper.json")
    plain = train(tmp_path / "plain", "--mask", tmp_path / "upper.json")
    assert plain.code == 0, plain.err
    answer = train(tmp_path / "run", "--mask", tmp_path / "upper.json", "--gradient-checkpointing")
    assert answer.code == 0, answer.err
    _, model = args_seen[-1]
    functions = {
        module._gradient_checkpointing_func
        for module in model.modules()
        if "_gradient_checkpointing_func" in vars(module)
    }
    assert functions and all(isinstance(function, PrefixAware) for function in functions)
    assert load_run(tmp_path / "run")["losses"] == load_run(tmp_path / "plain")["losses"]


# ---- evaluation


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "2", "--dropout", "0.1"),
        ("--full",),
        ("--rank", "2", "--bf16"),
        ("--rank", "2", "--packing"),
        ("--rank", "2", "--select-at", "0.5", "--blocks", "1", "--cache-prefix"),
    ],
    ids=" ".join,
)
def test_evaluations_change_no_step(options, ila, source, tmp_path):
    def run(folder, *more):
        begin = ("train", *source[:4], *SHORT, "--held-out", "0.25", *options, *more)
        answer = ila(*begin, "--out", tmp_path / folder)
        assert answer.code == 0, answer.err
        return load_run(tmp_path / folder)

    without, evaluated = run("without"), run("with", "--eval-every", "1")
    assert evaluated["losses"] == without["losses"]
    assert evaluated["held_out_loss"] == without["held_out_loss"]
    assert [step for step, _ in evaluated["evaluations"]] == [1, 2, 3, 4]
    assert evaluated["evaluations"][-1][1] == evaluated["held_out_loss"]
    assert "evaluations" not in without


@pytest.mark.parametrize("more", [(), ("--select-at", "0.5", "--top", "0.3")], ids=["", "selects"])
@pytest.mark.parametrize("call", [3, 4])
def test_a_broken_run_resumes_with_its_evaluations(call, more, train, tmp_path, monkeypatch):
    calls, original = [], Trainer.training_step

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    options = ("--eval-every", "1", "--scheduler", "cosine", "--gradient-checkpointing", *more)
    assert train(tmp_path / "whole", *options).code == 0
    monkeypatch.setattr(Trainer, "training_step", step)
    assert train(tmp_path / "broken", *options).code == 130
    assert train(tmp_path / "broken", *options, "--resume").code == 0
    names = ("losses", "evaluations", "held_out_loss")
    whole, broken = load_run(tmp_path / "whole"), load_run(tmp_path / "broken")
    assert [broken[name] for name in names] == [whole[name] for name in names]
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_both_parts_of_a_run_keep_their_reports(train, tmp_path):
    pytest.importorskip("tensorboard")
    options = ("--select-at", "0.5", "--top", "0.3", "--report-to", "tensorboard")
    answer = train(tmp_path / "run", *options)
    assert answer.code == 0, answer.err
    steps = [step for step, _ in scalars(tmp_path / "run" / "logs")["train/loss"]]
    assert sorted(steps) == [1, 2, 3, 4]


# ---- epochs, packing


@pytest.mark.parametrize(
    ("options", "epochs", "batches"),
    [
        (("--gradient-accumulation", "2"), 1.5, "11 rows in batches of 2 are 6, 3 steps an epoch"),
        ((), 2, "6 steps an epoch"),
        (("--set", "dataloader_drop_last=true"), 1, "the last row alone is dropped"),
        (("--select-at", "0.5", "--top", "0.3"), 1, "6 steps, selected after 3"),
    ],
)
def test_epochs_are_counted_as_trainer_counts(options, epochs, batches, ila, source, tmp_path):
    run = ("train", *source, "--batch-size", "2", "--epochs", epochs, *options)
    answer = ila(*run, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = load_run(tmp_path / "run")["steps"]
    assert len(log) == steps == {1.5: 5, 2: 12, 1: 5 if "--set" in options else 6}[epochs]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == epochs


def test_a_model_knows_its_epochs_as_trainer_does(train, tmp_path, monkeypatch):
    ends, original = [], Trainer.train

    def trained(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        ends.append(self.state.epoch)
        return result

    monkeypatch.setattr(Trainer, "train", trained)
    config = TrainConfig(epochs=2, batch_size=2).for_rows(11, 1)
    answer = train(tmp_path / "run", "--steps", config.steps)
    assert answer.code == 0 and ends == [2.0]


def test_packing_gives_the_losses_of_padding(train, tmp_path):
    for name, more in (("padded", ()), ("packed", ("--packing",))):
        answer = train(tmp_path / name, *more)
        assert answer.code == 0, answer.err
        assert ("the rows of a batch are packed" in answer.out) is bool(more)
    padded, packed = (load_run(tmp_path / name) for name in ("padded", "packed"))
    for (_, one), (_, other) in zip(padded["losses"], packed["losses"], strict=True):
        assert other == pytest.approx(one, rel=1e-5)  # fp32: the same sums in another order
    assert packed["config"]["packing"] is True and "packing" not in padded["config"]


def test_packing_is_refused_where_rows_look_at_each_other(train, tmp_path, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: None)
    answer = train(tmp_path / "run", "--packing")
    assert "packing would not be exact" in answer.error() and not (tmp_path / "run").exists()


# ---- wrong input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold names and values, got nothing"),
        ("- steps", "must hold names and values, got list"),
        ("steps: [1", "run.yaml: "),
        ("\t steps: 1", "run.yaml: "),
        ("steps: 1\nsteps: 2", "steps stands twice in one mapping"),
        ("3: 4", "names must be texts, got 3"),
        ("steps: many", "run.yaml: steps: "),
        ("steps: 2.5", "run.yaml: steps: "),
        ("steps: [2]", "steps must be one number or text, got [2]"),
        ("steps: true", "steps must be one number or text, got True"),
        ("cache_prefix: 1", "cache_prefix must be true or false, got 1"),
        ("train: 3", "train must hold names and values, got 3"),
        (
            "stage1_steps: 4",
            "stage1_steps is no option of ila train in a file; put it under learn:",
        ),
        ("set: [a=b]", "set is no option of ila train in a file"),
        ("sheduler: cosine", "sheduler is no option and no field of TrainingArguments"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type"),
        ("scheduler: cosin", "cosin"),
        ("weight_decay: much", "weight_decay"),
        ("adam_beta1: much", "adam_beta1: invalid float value: 'much'"),
        ("adam_beta1: [0.9]", "adam_beta1 must be float, got [0.9]"),
        ("adam_beta1: null", "adam_beta1 must be float, got None"),
        ("max_steps: 3", "max_steps cannot be set: set steps or epochs instead"),
        ("eval_steps: 3", "eval_steps cannot be set: set eval_every instead"),
        ("save_only_model: true", "save_only_model cannot be set: a run resumes"),
        ("logging_steps: 3", "every step is logged"),
        ("epochs: 1\nsteps: 3", "give one of --steps and --epochs, got both"),
        ("eval_every: 0", "eval_every must be None or an integer ≥ 1, got 0"),
        ("eval_every: 2\nheld_out: 0", "--held-out is 0"),
        ("packing: true\ncache_prefix: true", "packing and cache_prefix exclude each other"),
        ("optim: adam", "optim='adam'"),
        ("optim: galore_adamw", "training_args optim='galore_adamw'"),
        ("lr_scheduler_kwargs: {eta: 1}\nscheduler: cosine", "training_args"),
        ("report_to: tensorbord", "tensorbord"),
        ("report_to: [none, wandb, comet_ml]", "report_to"),
    ],
)
def test_a_wrong_file_is_one_clear_line_and_no_folder(text, said, ila, source, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    out = tmp_path / "out"
    answer = ila("train", "--config", tmp_path / "run.yaml", *source, "--out", out)
    assert said in answer.error() and not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--set", "optim"), "--set takes NAME=VALUE, got 'optim'"),
        (("--set", "optin=sgd"), "--set optin is no option and no field of TrainingArguments"),
        (("--set", "optim=[", "--steps", "2"), "--set optim"),
        (("--set", "optim=sgd", "--optim", "sgd"), "an option has set optim already"),
        (("--set", "optim=sgd", "--set", "optim=sgd"), "--set optim stands twice"),
        (("--set", "num_train_epochs=2"), "set steps or epochs instead"),
        (("--set", "neftune_noise_alpha=x"), "neftune_noise_alpha"),
        (("--epochs", "1"), "give one of --steps and --epochs, got both"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--packing", "--cache-prefix"), "exclude each other"),
        (("--report-to", "none,nowhere"), "nowhere"),
    ],
)
def test_a_wrong_option_is_one_clear_line_and_no_folder(options, said, train, tmp_path):
    assert said in train(tmp_path / "out", *options).error() and not (tmp_path / "out").exists()


def test_a_value_of_set_is_a_value_of_yaml(train, tmp_path, args_seen):
    pairs = ("optim=sgd", "max_grad_norm=1e-1", "lr_scheduler_kwargs={num_cycles: 2}")
    given = [text for pair in pairs for text in ("--set", pair)]
    answer = train(tmp_path / "run", *given, "--scheduler", "cosine_with_restarts")
    assert answer.code == 0, answer.err
    ((args, _),) = args_seen
    assert args.optim == "sgd" and args.max_grad_norm == 0.1
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_every_option_is_in_one_table_and_every_field_is_known():
    assert not set(SEARCH) & set(TRAIN) and not set(RUN) & set(TRAINER)
    assert set(FIELDS) <= set(TRAINER)

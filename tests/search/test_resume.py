"""A run that was killed and resumed is the run that was not, in every score, loss and weight.

Dropout is on, so the random state counts; ten rows in steps of two make epochs of five steps, so
runs of eight and seven steps are broken off within an epoch, at its end, and in the next.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import ila.search.learn
import ila.training.adapter
import ila.training.train
from ila.masks.checks import thawed
from ila.runs.checkpoints import MarkComplete, last_complete
from ila.search.gate_gradients import PathGradient
from ila.training.config import TrainConfig
from ila.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
STEP, RNG, MARK = (
    (Trainer, "training_step"),
    (Trainer, "_save_rng_state"),
    (MarkComplete, "on_save"),
)
TRAIN = (Trainer, "train")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def known(mask):
    """What a mask says of its search, but for the seconds that it took."""
    said = thawed(mask.provenance)
    for cost in said["cost"].values():
        assert cost.pop("seconds") >= 0
    return said


def check_same(found, expected):
    mask, model, folder = found
    mask_expected, model_expected, folder_expected = expected
    assert dict(mask.scores) == dict(mask_expected.scores)
    assert known(mask) == known(mask_expected)
    weights, weights_expected = adapter(model), adapter(model_expected)
    assert weights.keys() == weights_expected.keys()
    assert all(torch.equal(weights[name], weights_expected[name]) for name in weights)
    assert log_of(folder) == log_of(folder_expected)
    saved = "adapter/adapter_model.safetensors"
    assert (folder / saved).read_bytes() == (folder_expected / saved).read_bytes()


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return a keeper of unbroken searches: what two tests compare with is run once."""
    kept = {}

    def keep(key, run):
        if key not in kept:
            kept[key] = run(tmp_path_factory.mktemp("whole"))
        return kept[key]

    return keep


def check_each_step_once(folder, stage1=8, stage2=7):
    log = log_of(folder)
    for stage, steps in (("stage1", stage1), ("stage2", stage2)):
        losses = [e["step"] for e in log if e["stage"] == stage and "loss" in e]
        assert losses == list(range(1, steps + 1))
    spreads = [e["step"] for e in log if "scores" in e]
    assert spreads in ([], list(range(1, stage2 + 1)))


@pytest.mark.parametrize(
    ("method", "where", "call", "after"),
    [
        ("ila", STEP, 1, False),  # nothing is there yet but the folder
        ("ila", STEP, 3, False),  # no checkpoint yet, two lines in the log
        ("ila", STEP, 6, True),  # the next epoch has begun; the last checkpoint is of this one
        ("ila", RNG, 2, False),  # while the second checkpoint is being written
        ("ila", MARK, 2, False),  # it is written, but nothing says so
        ("ila", TRAIN, 1, True),  # stage 1 is done, its adapter not saved
        (
            "ila",
            (ila.training.adapter, "save_adapter"),
            1,
            True,
        ),  # saved, but in a folder of no name yet
        ("ila", STEP, 9, False),  # in the first step of stage 2
        ("ila", STEP, 13, True),
        ("ila", RNG, 5, False),
        ("ila", TRAIN, 2, True),  # stage 2 is done, nobody has read its scores
        ("path", STEP, 6, True),
        ("path", STEP, 13, True),
        ("path", MARK, 5, False),
        ("path", (PathGradient, "mean"), 1, False),
        ("gate_gradient", STEP, 8, False),
        ("gate_gradient", TRAIN, 1, True),
    ],
)
def test_a_search_broken_off_anywhere_resumes_to_the_same_bits(
    method, where, call, after, make_llama, rows, search, break_off, killed, tmp_path, references
):
    model = make_llama()
    expected = references(
        method, lambda to: (search(model, rows, method=method, output_dir=to), model, to)
    )
    folder = tmp_path / "broken"
    break_off(*where, call, after=after)
    with pytest.raises(killed):
        search(make_llama(), rows, method=method, output_dir=folder)
    model = make_llama()
    mask = search(model, rows, method=method, output_dir=folder, resume=True)
    check_same((mask, model, folder), expected)
    check_each_step_once(folder, stage2=0 if method == "gate_gradient" else 7)


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        (7, {"training_args": {"gradient_accumulation_steps": 2}}),
        (25, {"training_args": {"gradient_accumulation_steps": 2}}),
        (7, {"training_args": {"max_grad_norm": 0.01, "weight_decay": 0.1}}),
        (7, {"batch_size": 3}),  # the last batch of an epoch is smaller
        (13, {"save_every": 1}),
        (13, {"save_every": 100}),  # only at the end of a stage
        (13, {"save_every": None}),
    ],
)
def test_resuming_holds_for_other_settings(
    changes, call, make_llama, rows, search, break_off, killed, tmp_path
):
    model = make_llama()
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    expected = (search(model, rows, output_dir=whole, **changes), model, whole)
    break_off(*STEP, call)
    with pytest.raises(killed):
        search(make_llama(), rows, output_dir=folder, **changes)
    model = make_llama()
    mask = search(model, rows, output_dir=folder, resume=True, **changes)
    check_same((mask, model, folder), expected)
    check_each_step_once(folder)


def test_a_search_killed_again_and_again_ends_the_same(
    make_llama, rows, search, break_off, killed, tmp_path
):
    model = make_llama()
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    expected = (search(model, rows, output_dir=whole), model, whole)
    for kill, call in enumerate([5, 3, 6, 2]):
        break_off(*STEP, call)
        with pytest.raises(killed):
            search(make_llama(), rows, output_dir=folder, resume=kill > 0)
    model = make_llama()
    mask = search(model, rows, output_dir=folder, resume=True)
    check_same((mask, model, folder), expected)
    check_each_step_once(folder)


@pytest.mark.parametrize("name", ["default", "other"])
def test_after_resuming_stage_2_only_scores_require_grad(
    name, make_llama, rows, search, break_off, killed, tmp_path, monkeypatch
):
    # Trainer loads and activates an adapter that is not called "default", and activating it makes
    # it trainable: A and B would cost gradients, and x would be saved for them.
    break_off(*STEP, 13)
    with pytest.raises(killed):
        search(make_llama(adapter_name=name), rows, output_dir=tmp_path)
    seen, original = set(), Trainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or parameter.grad is not None:
                seen.add(".lora_S." in name)
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    search(make_llama(adapter_name=name), rows, output_dir=tmp_path, resume=True)
    assert seen == {True}


def test_a_finished_search_resumed_gives_its_mask_again(make_llama, rows, search, tmp_path):
    model = make_llama()
    first = (search(model, rows, output_dir=tmp_path / "a"), model, tmp_path / "a")
    again = make_llama()
    mask = search(again, rows, output_dir=tmp_path / "a", resume=True)
    check_same((mask, again, tmp_path / "a"), first)


@pytest.mark.parametrize("call", [5, 13])
def test_an_adapter_of_another_name_resumes_too(
    call, make_llama, rows, search, break_off, killed, tmp_path
):
    options = {"adapter_name": "other"}
    model = make_llama(**options)
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    expected = (search(model, rows, output_dir=whole), model, whole)
    break_off(*STEP, call)
    with pytest.raises(killed):
        search(make_llama(**options), rows, output_dir=folder)
    model = make_llama(**options)
    mask = search(model, rows, output_dir=folder, resume=True)
    check_same((mask, model, folder), expected)


def constant(model):
    """Zero what is read out: the loss is log(words) whatever the adapter does."""
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


@pytest.mark.parametrize(("where", "call"), [(STEP, 3), (STEP, 4), (TRAIN, 1)])
@pytest.mark.parametrize(("epsilon", "steps"), [(1e-3, 4), (0.0, 8)])
def test_stability_decides_after_resuming_as_without(
    where, call, epsilon, steps, make_llama, rows, search, break_off, killed, tmp_path
):
    # (TRAIN, 1): killed when stable, right after the checkpoint; a further step would be too many.
    options = {"epsilon": epsilon, "method": "gate_gradient", "save_every": 2}
    model = constant(make_llama())
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    expected = (search(model, rows, output_dir=whole, **options), model, whole)
    assert expected[0].provenance["stage1"]["steps"] == steps
    break_off(*where, call, after=where is TRAIN)
    with pytest.raises(killed):
        search(constant(make_llama()), rows, output_dir=folder, **options)
    model = constant(make_llama())
    mask = search(model, rows, output_dir=folder, resume=True, **options)
    check_same((mask, model, folder), expected)


# ---- damaged checkpoints


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "no marker": lambda folder: (folder / "complete.json").unlink(),
    "half a marker": lambda folder: cut(folder / "complete.json"),
    "an empty marker": lambda folder: (folder / "complete.json").write_bytes(b""),
    "a marker of another kind": lambda folder: (folder / "complete.json").write_text("[1]"),
    "half the weights": lambda folder: cut(folder / "adapter_model.safetensors"),
    "half the optimiser": lambda folder: cut(folder / "optimizer.pt"),
    "an empty state": lambda folder: (folder / "trainer_state.json").write_bytes(b""),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "no sums": lambda folder: (folder / "layer_mean.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage, make_llama, rows, search, break_off, killed, tmp_path, monkeypatch, references
):
    model, folder = make_llama(), tmp_path / "broken"
    options = {"method": "gate_gradient"}
    expected = references(
        options["method"], lambda to: (search(model, rows, output_dir=to, **options), model, to)
    )
    break_off(*STEP, 8)
    with pytest.raises(killed):
        search(make_llama(), rows, output_dir=folder, **options)
    stage = folder / "stage1"
    assert last_complete(stage) == stage / "checkpoint-6"
    DAMAGE[damage](stage / "checkpoint-6")
    assert last_complete(stage) == stage / "checkpoint-3"
    steps, original = [], Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda *a, **k: (steps.append(1), original(*a, **k))[1]
    )
    model = make_llama()
    mask = search(model, rows, output_dir=folder, resume=True, **options)
    assert len(steps) == 8 - 3
    check_same((mask, model, folder), expected)


def test_a_log_line_cut_off_is_written_again(make_llama, rows, search, break_off, killed, tmp_path):
    model = make_llama()
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    expected = (search(model, rows, output_dir=whole), model, whole)
    break_off(*STEP, 6)
    with pytest.raises(killed):
        search(make_llama(), rows, output_dir=folder)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"stage": "stage1", "step": 6, "lo')
    model = make_llama()
    mask = search(model, rows, output_dir=folder, resume=True)
    check_same((mask, model, folder), expected)


# ---- training


@pytest.fixture
def run_train(rows):
    def run(model, folder, *, resume=False, **changes):
        options = {"steps": 8, "batch_size": 2, "learning_rate": 1e-2, "save_every": 3}
        metrics = train(
            model,
            rows[:8],
            TrainConfig(**options | changes),
            held_out=rows[8:],
            output_dir=folder,
            resume=resume,
            progress=False,
        )
        return metrics, folder

    return run


def check_same_training(found, expected):
    (metrics, folder), (metrics_expected, folder_expected) = found, expected
    unequal = {"step_time_ms", "peak_memory_bytes"}
    assert {k: v for k, v in metrics.items() if k not in unequal} == {
        k: v for k, v in metrics_expected.items() if k not in unequal
    }
    assert metrics["step_time_ms"]["median"] > 0
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in folder_expected.iterdir()}
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (folder_expected / weights).read_bytes()
    assert log_of(folder) == log_of(folder_expected)
    assert [e["step"] for e in log_of(folder)] == list(range(1, metrics["steps"] + 1))


@pytest.mark.parametrize(
    ("where", "call", "after"),
    [
        (STEP, 1, False),
        (STEP, 5, True),
        (STEP, 8, True),
        (RNG, 2, False),
        (MARK, 2, False),
        (TRAIN, 1, True),
        ((ila.training.adapter, "save_adapter"), 1, True),
    ],
)
def test_a_training_broken_off_anywhere_resumes_to_the_same_bits(
    where, call, after, make_llama, run_train, break_off, killed, tmp_path
):
    expected = run_train(make_llama(), tmp_path / "whole")
    break_off(*where, call, after=after)
    with pytest.raises(killed):
        run_train(make_llama(), tmp_path / "broken")
    assert not (tmp_path / "broken" / "metrics.json").exists()
    found = run_train(make_llama(), tmp_path / "broken", resume=True)
    check_same_training(found, expected)


# ---- a real kill

VICTIM = """
import json, os, signal, sys
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM, Trainer
import ila
from ila.search.learn import SearchConfig, learn_mask
from ila.training.config import TrainConfig
from ila.training.train import train

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
base = LlamaForCausalLM.from_pretrained(job["model"])
torch.manual_seed(5)
config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, task_type="CAUSAL_LM",
                    target_modules="all-linear")
model = ila.attach(base, config)
original, calls = getattr(Trainer, job["where"]), 0

def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == job["call"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(Trainer, job["where"], dying)
options = {"batch_size": 2, "learning_rate": 1e-2, "save_every": 3}
if job["what"] == "search":
    options |= {"stage1_steps": 8, "stage2_steps": 7, "epsilon": 0.0, "stability_window": 2}
    config = SearchConfig(**options)
    learn_mask(model, job["rows"], config, output_dir=job["folder"], progress=False)
else:
    train(model, job["rows"][:8], TrainConfig(steps=8, **options), held_out=job["rows"][8:],
          output_dir=job["folder"], progress=False)
"""


@pytest.mark.parametrize(
    ("what", "where", "call"),
    [
        ("search", "training_step", 5),
        ("search", "_save_rng_state", 5),  # in stage 2, while its second checkpoint is written
        ("train", "_save_rng_state", 2),
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_resumes_to_the_same_bits(
    what, where, call, make_llama, rows, search, run_train, tiny_model_folder, tmp_path
):
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    job = {"what": what, "where": where, "call": call, "rows": rows}
    job |= {"model": str(tiny_model_folder), "folder": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, json.dumps(job)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, again = make_llama(), make_llama()
    if what == "search":
        expected = (search(model, rows, output_dir=whole), model, whole)
        found = (search(again, rows, output_dir=folder, resume=True), again, folder)
        check_same(found, expected)
        check_each_step_once(folder)
    else:
        expected = run_train(model, whole)
        check_same_training(run_train(again, folder, resume=True), expected)

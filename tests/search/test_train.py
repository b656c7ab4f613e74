"""Laws of selective training: what it changes, what it writes, and what it measures."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Trainer

import ila
import ila.runs.meter
from ila.data.encoding import Collator
from ila.masks.mask import LayerMask
from ila.models.edit import masked_layers
from ila.runs.meter import StepMeter
from ila.runs.metrics import load_run
from ila.training.config import TrainConfig
from ila.training.loop import default_collator, held_out_loss
from ila.training.train import train


def quick(**changes):
    options = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "save_every": 2}
    return TrainConfig(**options | changes)


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def masked(model, kept):
    names = list(masked_layers(model, "default"))
    ila.apply_mask(
        model, LayerMask(dict.fromkeys(names, 0.0), {n: i in kept for i, n in enumerate(names)})
    )
    return model, [names[i] for i in kept]


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_run_is_a_plain_adapter_and_metrics_that_the_report_reads(
    name, make_llama, rows, tmp_path, tiny_model_folder
):
    model = make_llama(adapter_name=name)
    out = tmp_path / "run"
    options = {"held_out": rows[8:], "output_dir": out, "progress": False, "name": "mine"}
    metrics = train(model, rows[:8], quick(), **options)
    assert load_run(out) == metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["name"] == "mine" and metrics["steps"] == 4
    assert metrics["open_modules"] == metrics["total_modules"] == 14
    assert metrics["fraction_open"] == 1.0
    assert [step for step, _ in metrics["losses"]] == [1, 2, 3, 4]
    assert metrics["tokens_per_step"] == 2 * 7
    assert metrics["device"] == "cpu" and metrics["dtype"] == "float32"
    assert metrics["peak_memory_bytes"] is None or metrics["peak_memory_bytes"] > 2**20
    assert {p.name for p in out.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not (out / "checkpoints").exists() and not (out / "before.json").exists()
    # What the metrics say of the model is true of the adapter on the disk, in plain PEFT.
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_folder), str(out))
    loss = held_out_loss(plain, rows[8:], Collator(0), 2)
    assert loss == pytest.approx(metrics["held_out_loss"], rel=1e-6)
    bare = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    before = held_out_loss(bare, rows[8:], Collator(0), 2)
    assert metrics["held_out_loss_before"] == pytest.approx(before, rel=1e-6)
    assert metrics["held_out_loss"] != metrics["held_out_loss_before"]


def test_a_finished_run_resumed_returns_the_same_without_training(
    make_llama, rows, tmp_path, monkeypatch
):
    model, other = make_llama(), make_llama()
    first = train(model, rows, quick(), output_dir=tmp_path / "run", progress=False)
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    again = train(other, rows, quick(), output_dir=tmp_path / "run", progress=False, resume=True)
    assert again == first
    weights, expected = parameters(other), parameters(model)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_only_open_layers_change(make_llama, rows, tmp_path):
    model, kept = masked(make_llama(lora_dropout=0.0), [3, 8])
    layers = masked_layers(model, "default")
    before = parameters(model)
    aside = {
        name: [p.detach().clone() for p in layer._closed["default"]["lora_A"].parameters()]
        for name, layer in layers.items()
        if name not in kept
    }
    metrics = train(model, rows, quick(), output_dir=tmp_path / "run", progress=False)
    assert metrics["open_modules"] == 2 and metrics["total_modules"] == 14
    assert metrics["fraction_open"] == pytest.approx(2 / 14)
    after = parameters(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.lora_{part}.default.weight" for name in kept for part in "AB"}
    assert metrics["trainable_parameters"] == sum(before[name].numel() for name in changed)
    assert len(aside) == 12
    ila.restore(model)
    for name, tensors in aside.items():
        module = model.get_submodule(name)
        assert torch.equal(module.lora_A["default"].weight, tensors[0])
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert {f"base_model.model.{n}" for n in saved["target_modules"]} == set(kept)


def test_plain_peft_layers_are_trained_and_counted(tiny_model_folder, rows):
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    metrics = train(get_peft_model(base, config), rows, quick(), progress=False)
    assert metrics["open_modules"] == metrics["total_modules"] == 4
    assert metrics["held_out_loss"] is None is metrics["held_out_loss_before"]


def test_a_model_with_nothing_to_train_is_refused(make_llama, rows, tmp_path):
    model = make_llama()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters that require grad; none does"):
        train(model, rows, quick(), output_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_by_the_field(make_llama, rows, tmp_path):
    options = {"output_dir": tmp_path / "run", "progress": False}
    train(masked(make_llama(), [3, 8])[0], rows, quick(), **options)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}

    def again(kept, dataset, resume=True, **changes):
        model, _ = masked(make_llama(), kept)
        train(model, dataset, quick(**changes), resume=resume, **options)

    with pytest.raises(ValueError, match="holds a run already; give another folder, or go on"):
        again([3, 8], rows, resume=False)
    with pytest.raises(ValueError, match=r"differs in config\.seed, config\.steps;"):
        again([3, 8], rows, steps=5, seed=1)
    with pytest.raises(ValueError, match=r"differs in open_modules, .*trained;"):
        again([3], rows)
    # As many layers of the same shapes, but other ones (the first block's, the second's).
    with pytest.raises(ValueError, match="differs in trained;"):
        again([10, 1], rows)
    with pytest.raises(ValueError, match="differs in rows;"):
        again([3, 8], rows[1:])
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_disk_that_fills_up_while_saving_leaves_no_finished_run(
    make_llama, rows, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            train(make_llama(), rows, quick(save_every=None), output_dir=out, progress=False)
    left = {path.name for path in out.iterdir()}
    assert left == {"train.json", "before.json", "log.jsonl", "checkpoints"}  # the last one empty
    assert not list((out / "checkpoints").iterdir())
    options = {"output_dir": out, "progress": False}
    metrics = train(make_llama(), rows, quick(save_every=None), resume=True, **options)
    assert load_run(out) == metrics


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"save_every": 0},
    ],
)
def test_a_configuration_out_of_range_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} must be"):
        TrainConfig(**change)


def test_mixed_precision_leaves_the_model_and_both_losses_as_they_were(make_llama, rows):
    model = make_llama()
    config = quick(training_args={"bf16": True, "use_cpu": True}, learning_rate=1e-12)
    metrics = train(model, rows[:8], config, held_out=rows[8:], progress=False)
    assert "forward" not in vars(model)
    # The same model to twelve digits: under autocast the second loss would differ in the third.
    assert metrics["held_out_loss"] == pytest.approx(metrics["held_out_loss_before"], rel=1e-6)


# ---- the held-out loss


def ragged():
    rows = []
    for length, answer in ((9, 2), (4, 3), (6, 5), (3, 1), (7, 7)):
        ids = [3 + (5 * length + i) % 20 for i in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length - answer) + ids[-answer:]})
    return rows


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_held_out_loss_is_the_mean_over_answer_tokens(batch_size, make_llama):
    model, rows = make_llama(init_lora_weights=False), ragged()
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for place, label in enumerate(row["labels"]):
            if place > 0 and label != -100:
                total -= F.log_softmax(logits[place - 1], -1)[label].item()
                count += 1
    assert count == 2 + 3 + 5 + 1 + 6  # the last row's first token predicts nothing
    found = held_out_loss(model, rows, Collator(0), batch_size)
    # float32 logits of magnitude 10 over 17 tokens.
    assert found == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_held_out_loss_keeps_the_mode_and_draws_no_dropout(training, make_llama, rows):
    model = make_llama(lora_dropout=0.5, init_lora_weights=False).train(training)
    state = torch.get_rng_state()
    first, second = (held_out_loss(model, rows, Collator(0), 4) for _ in range(2))
    assert first == second and model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_without_labels_do_not_turn_the_held_out_loss_into_nan(make_llama, rows):
    model = make_llama()
    mute = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
    expected = held_out_loss(model, rows, Collator(0), 1)
    found = held_out_loss(model, [mute, *rows, mute], Collator(0), 1)
    assert found == expected
    with pytest.raises(ValueError, match="label to predict; its 2 rows have none"):
        held_out_loss(model, [mute, mute], Collator(0), 2)


# ---- costs and the collator


def test_step_times_are_ordered_and_leave_out_the_warm_up():
    costs = StepMeter(torch.device("cpu"))
    costs.times_ms = [900.0, 800.0, 700.0, *map(float, range(101))]
    assert costs.step_time_ms() == {"median": 50.0, "p10": 10.0, "p90": 90.0}
    costs.times_ms = [3.0, 1.0]  # a run shorter than the warm-up reports what it has
    assert costs.step_time_ms()["p10"] == 1.0 and costs.step_time_ms()["p90"] == 3.0


@pytest.mark.parametrize(
    ("peaks", "expected"), [((7, 5), 7), ((5, 7), 7), ((None, 7), None), ((7, None), None)]
)
def test_costs_of_a_resumed_run_are_those_of_all_its_parts(peaks, expected, tmp_path, monkeypatch):
    found = iter(peaks)
    monkeypatch.setattr(ila.runs.meter, "reset_peak", lambda device: True)
    monkeypatch.setattr(ila.runs.meter, "peak_bytes", lambda device: next(found))
    first, second = (StepMeter(torch.device("cpu")) for _ in range(2))
    first.begin()
    first.times_ms = [0.1, 1 / 3]
    first.save(tmp_path)
    second.load(tmp_path)
    second.begin()
    assert second.times_ms == first.times_ms
    assert second.peak_memory_bytes() == expected


def test_a_run_killed_and_resumed_reports_the_higher_peak(
    make_llama, rows, tmp_path, monkeypatch, break_off, killed
):
    peak = 3 << 40
    monkeypatch.setattr(ila.runs.meter, "reset_peak", lambda device: True)
    monkeypatch.setattr(ila.runs.meter, "peak_bytes", lambda device: peak)
    options = {"output_dir": tmp_path / "run", "progress": False}
    break_off(Trainer, "training_step", 4)
    with pytest.raises(killed):
        train(make_llama(), rows, quick(), **options)
    peak = 1 << 40
    metrics = train(make_llama(), rows, quick(), resume=True, **options)
    assert metrics["peak_memory_bytes"] == 3 << 40


def test_tokens_per_step_count_accumulated_batches(make_llama, rows):
    config = quick(steps=2, training_args={"gradient_accumulation_steps": 3})
    metrics = train(make_llama(), rows, config, progress=False)
    assert metrics["tokens_per_step"] == 3 * 2 * 7


@pytest.mark.parametrize(
    ("pad", "end", "expected"),
    [(5, 6, 5), (0, 6, 0), (None, 6, 6), (None, [7, 8], 7), (None, None, 0)],
)
def test_the_default_collator_pads_with_an_id_of_the_model(pad, end, expected):
    model = torch.nn.Module()
    model.config = type("Config", (), {"pad_token_id": pad, "eos_token_id": end})()
    assert default_collator(model).pad_token_id == expected


def test_tokens_per_step_leave_out_what_a_row_hides(make_llama, rows):
    hidden = [
        {**row, "input_ids": [0, *row["input_ids"]], "labels": [-100, *row["labels"]]}
        | {"attention_mask": [0] + [1] * len(row["input_ids"])}
        for row in rows
    ]
    metrics = train(make_llama(), hidden, quick(steps=1), progress=False)
    assert metrics["tokens_per_step"] == 2 * 7

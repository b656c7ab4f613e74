"""TRL's trainers on our layers give the losses of PEFT's, without knowing that we are there."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

import ila

pytest.importorskip("trl")
STEPS = 20


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def attached(base, config):
    return ila.attach(base, config)


def converted(base, config):
    model = get_peft_model(base, config)
    ila.convert(model)
    return model


@pytest.fixture
def build(tiny_model_folder):
    """Return a maker of the tiny model with an adapter, and its tokenizer."""

    def build(make):
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(3)
        model = make(LlamaForCausalLM.from_pretrained(tiny_model_folder), config)
        return model, AutoTokenizer.from_pretrained(tiny_model_folder)

    return build


def words(start: int, count: int) -> str:
    return " ".join("abcdefghijklmnopqrstuvwxyz"[(start + i) % 26] for i in range(count))


def options(folder) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model, tokenizer, folder) -> list[float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": words(i, 4), "completion": " " + words(i + 4, 6)} for i in range(8)]
    return losses(
        SFTTrainer(
            model,
            SFTConfig(**options(folder), max_length=32),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    )


def dpo(model, tokenizer, folder) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": words(i, 4), "chosen": " " + words(i + 4, 6), "rejected": " " + words(i, 6)}
        for i in range(8)
    ]
    return losses(
        DPOTrainer(
            model,
            args=DPOConfig(**options(folder), max_length=32),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    )


@pytest.mark.parametrize("method", [sft, dpo])
def test_twenty_steps_are_those_of_pefts_layers(build, method, tmp_path):
    found = {}
    for make in (get_peft_model, attached, converted):
        model, tokenizer = build(make)
        found[make] = method(model, tokenizer, tmp_path)
        if make is not get_peft_model:
            assert set(ila.explain(model).paths()) == {"eager"}
    expected = found[get_peft_model]
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.05
    for make in (attached, converted):
        assert found[make] == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("method", [sft, dpo])
def test_closed_layers_stay_closed_and_open_ones_learn(build, method, tmp_path):
    model, tokenizer = build(attached)
    names = [row.module for row in ila.explain(model)]
    mask = ila.LayerMask({name: float(i) for i, name in enumerate(names)}).top(0.3)
    ila.apply_mask(model, mask)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = method(model, tokenizer, tmp_path)
    assert len(found) == STEPS
    changed = {n for n, p in model.named_parameters() if not p.equal(before[n])}
    assert changed == {n for n in before if "lora_" in n}
    assert {n.split(".lora_")[0] for n in changed} == set(mask.open)

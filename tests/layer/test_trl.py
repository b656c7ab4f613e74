"""TRL's trainers on our layers give the losses of PEFT's, without knowing that we are there."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

import ila

pytest.importorskip("trl")
STEPS = 20
# TRL asks transformers by names that transformers 5 is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


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
        "activation_checkpointing": True,  # TRL's default, by its new name
        "seed": 5,
    }


def losses(trainer, convert: bool) -> list[float]:
    if convert:
        ila.convert(trainer.model)
    trainer.train()
    if convert:
        assert set(ila.explain(trainer.model).paths()) == {"eager"}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model, tokenizer, folder, peft_config=None, convert=False) -> list[float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": words(i, 4), "completion": " " + words(i + 4, 6)} for i in range(8)]
    trainer = SFTTrainer(
        model,
        SFTConfig(**options(folder), max_length=32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    return losses(trainer, convert)


def dpo(model, tokenizer, folder, peft_config=None, convert=False) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": words(i, 4), "chosen": " " + words(i + 4, 6), "rejected": " " + words(i, 6)}
        for i in range(8)
    ]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options(folder), max_length=32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    return losses(trainer, convert)


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
def test_an_adapter_that_trl_makes_is_converted_before_training(build, method, tmp_path):
    """DPO's reference is the model with this adapter disabled; of one it was given, a copy."""
    found = []
    for convert in (False, True):
        base, tokenizer = build(lambda base, config: base)
        torch.manual_seed(4)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        found.append(method(base, tokenizer, tmp_path, config, convert))
    expected, actual = found
    assert len(actual) == STEPS and expected[-1] < expected[0] - 0.05
    assert actual == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("method", [sft, dpo])
def test_closed_layers_stay_closed_and_open_ones_learn(build, method, tmp_path):
    model, tokenizer = build(attached)
    names = [row.module for row in ila.explain(model)]
    mask = ila.LayerMask({name: float(i) for i, name in enumerate(names)}).top(0.3)
    ila.apply_mask(model, mask)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = method(model, tokenizer, tmp_path)
    assert len(found) == STEPS
    changed = {n for n, value in before.items() if not model.get_parameter(n).equal(value)}
    assert changed == {n for n in before if "lora_" in n}
    assert {n.split(".lora_")[0] for n in changed} == set(mask.open)


def reward(model, tokenizer, folder, peft_config=None, convert=False) -> list[float]:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [{"chosen": words(i, 8), "rejected": words(i, 3)} for i in range(8)]
    trainer = RewardTrainer(
        model,
        args=RewardConfig(**options(folder), max_length=32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    return losses(trainer, convert)


def reward_base(folder):
    torch.manual_seed(2)
    return LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)


# TRL trains the head too: it names it in modules_to_save, or wants the user to.
REWARD = {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}


@pytest.mark.parametrize("make", [attached, converted])
def test_a_reward_model_learns_as_with_pefts_layers(make, tiny_model_folder, tmp_path):
    found, saved = [], []
    for one in (get_peft_model, make):
        base, tokenizer = (
            reward_base(tiny_model_folder),
            AutoTokenizer.from_pretrained(tiny_model_folder),
        )
        torch.manual_seed(3)
        model = one(base, LoraConfig(**REWARD, target_modules="all-linear"))
        found.append(reward(model, tokenizer, tmp_path / one.__name__))
        model.save_pretrained(tmp_path / one.__name__)
        saved.append(load_file(tmp_path / one.__name__ / "adapter_model.safetensors"))
    assert set(ila.explain(model).paths()) == {"eager"}
    expected, actual = found
    assert len(actual) == STEPS and expected[-1] < expected[0] - 0.05
    assert actual == pytest.approx(expected, rel=1e-5, abs=0)
    assert set(saved[0]) == set(saved[1]) and any("score" in name for name in saved[0])
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=1e-3, atol=1e-5)


def test_a_reward_adapter_that_trl_makes_is_converted_before_training(tiny_model_folder, tmp_path):
    found = []
    for convert in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
        config = LoraConfig(**REWARD, target_modules="all-linear")
        torch.manual_seed(4)
        base = reward_base(tiny_model_folder)
        found.append(reward(base, tokenizer, tmp_path, config, convert))
    expected, actual = found
    assert len(actual) == STEPS and expected[-1] < expected[0] - 0.05
    assert actual == pytest.approx(expected, rel=1e-5, abs=0)


def test_a_reward_model_with_closed_layers(tiny_model_folder, tmp_path):
    torch.manual_seed(3)
    model = ila.attach(
        reward_base(tiny_model_folder), LoraConfig(**REWARD, target_modules="all-linear")
    )
    names = [row.module for row in ila.explain(model)]
    ila.apply_mask(model, ila.LayerMask({name: float(i) for i, name in enumerate(names)}).top(0.3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    reward(model, AutoTokenizer.from_pretrained(tiny_model_folder), tmp_path)
    changed = {n for n, value in before.items() if not model.get_parameter(n).equal(value)}
    trained = {n for n in before if "lora_" in n or "modules_to_save" in n}
    assert changed == trained and any("score" in name for name in changed)

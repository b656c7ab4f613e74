"""`ila.TakeOver`: our layers in a trainer that another tool makes; options by keys of that tool."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import ila
from ila.data import Collator
from ila.plugins.options import PluginOptions


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def make_trainer(tiny_model_folder, tmp_path):
    """Return a maker of PEFT's model in a plain Trainer, as other tools make them."""
    rows = [{"input_ids": list(range(i, i + 9)), "labels": list(range(i, i + 9))} for i in range(9)]

    def make(*callbacks, steps=6, optimizer=False):
        set_seed(0)
        base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "trainer"), max_steps=steps, per_device_train_batch_size=2,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        )  # fmt: skip
        made = torch.optim.AdamW(model.parameters(), lr=1e-2) if optimizer else None
        return Trainer(
            model, arguments, Collator(0), rows, callbacks=list(callbacks), optimizers=(made, None)
        )

    return make


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first_mask(trainer, share: float) -> ila.LayerMask:
    names = [n for n, m in trainer.model.named_modules() if hasattr(m, "lora_A")]
    return ila.LayerMask({n: float(-i) for i, n in enumerate(names)}).top(share)


def test_all_open_the_losses_are_those_of_plain_peft(make_trainer):
    plain = losses(make_trainer())
    ours = make_trainer(ila.TakeOver())
    assert set(ila.explain(ours.model).paths()) == {"eager"}
    assert losses(ours) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("optimizer", [False, True], ids=["later optimiser", "given optimiser"])
def test_a_mask_leaves_the_optimiser_the_open_layers(make_trainer, tmp_path, optimizer):
    mask = first_mask(make_trainer(), 0.3)
    mask.save(tmp_path / "mask.json")
    trainer = make_trainer(ila.TakeOver(tmp_path / "mask.json"), optimizer=optimizer)
    losses(trainer)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    adapters = {
        n.rpartition(".lora_")[0]: id(p)
        for n, p in trainer.model.named_parameters()
        if ".lora_" in n
    }
    assert set(adapters) == set(mask.open) and set(adapters.values()) <= held
    assert len([p for p in trainer.model.parameters() if p.requires_grad]) == 2 * len(mask.open)


def test_with_select_layers_the_run_selects(make_trainer):
    selection = ila.SelectLayers(at=0.5, top=0.3)
    trainer = make_trainer(ila.TakeOver(lean_head=True), selection, steps=6)
    losses(trainer)
    assert len(selection.mask.open) == 4 and len(selection.mask) == 14
    assert ila.explain(trainer.model).head


def test_a_model_of_attach_is_left_as_it_is(tiny_model_folder):
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = ila.attach(base, lora)
    modules = {id(m) for m in model.modules()}
    ila.TakeOver().prepare(model)
    assert {id(m) for m in model.modules()} == modules


def test_a_wrong_word_a_wrong_file_and_a_wrong_mask_are_errors(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="closed must be one of"):
        ila.TakeOver(closed="shut")
    with pytest.raises(ValueError, match="no such mask file"):
        ila.TakeOver(tmp_path / "none.json")
    with pytest.raises(ValueError, match="mask must name the 14 LoRA layers"):
        make_trainer(ila.TakeOver(ila.LayerMask({"a": 1.0})))


def test_options_make_the_callbacks():
    given = {
        "base_model": "x", "ila_select_at": 0.25, "ila_top": 0.3, "ila_closed": "drop",
        "ila_score": "path", "ila_objective": "blocks",
    }  # fmt: skip
    (selection,) = PluginOptions.read(given).callbacks()
    assert selection.selection.as_dict() == {
        **ila.SelectLayers(0.25, top=0.3, objective="blocks").selection.as_dict(),
        "closed": "drop",
        "method": "path",
    }
    assert PluginOptions.read({"base_model": "x"}).callbacks() == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ila_tob": 0.3}, "ila_tob is no option; .*; ila_top is close to it"),
        ({"ila_top": 0.3}, "ila_top selects in the middle of a run; give ila_select_at too"),
        ({"ila_select_at": 0.25}, "exactly one of .*top"),
        ({"ila_select_at": 0.25, "ila_top": "much"}, "ila_top must be a number, got 'much'"),
        ({"ila_select_at": 2.5, "ila_top": 0.3}, "at must be a share in"),
        ({"ila_select_at": 0.25, "ila_top": 0.3, "ila_mask": "m"}, "leave out ila_mask"),
        ({"ila_closed": "keep"}, "give ila_mask"),
        ({"ila_select_at": 0.25, "ila_top": 0.3, "ila_score": "guess"}, "method must be one of"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(given, said):
    with pytest.raises(ValueError, match=said):
        PluginOptions.read(given)

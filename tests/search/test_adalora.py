"""Searches and trainings of AdaLoRA: its schedule, its files, and runs that are broken off."""

import json

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

import ila
from ila.price.choice import Choice
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.training.adapter import Adapter
from ila.training.config import TrainConfig
from ila.training.loop import default_collator, held_out_loss
from ila.training.train import arguments_of, train

STEPS = 30
# PEFT looks for the ranks of AdaLoRA among those of LoRA when it loads an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match")


def config_of(**changes):
    options = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": STEPS, "tfinal": 6}
    options |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    return AdaLoraConfig(**options | changes)


@pytest.fixture
def make(tiny_model_folder):
    """Return a maker of a tiny Llama with AdaLoRA, always the same one."""

    def make(config=None, attach=ila.attach):
        torch.manual_seed(5)
        base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
        return attach(base, config_of() if config is None else config)

    return make


@pytest.fixture
def options():
    return TrainConfig(steps=STEPS, batch_size=2, learning_rate=1e-2, save_every=7)


class PeftSchedule(TrainerCallback):
    """The schedule as a user of PEFT writes it for Trainer."""

    def __init__(self, model):
        self.model = model

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.model.base_model.update_and_allocate(state.global_step)


def some(mask):
    return ila.LayerMask(mask.scores, {n: "layers.1" in n for n in mask.scores})


def mask_over(model):
    names = [n for n, m in model.named_modules() if hasattr(m, "lora_E")]
    return some(ila.LayerMask(dict.fromkeys(names, 1.0)))


def test_thirty_steps_of_train_have_pefts_losses(make, rows, options, tmp_path):
    config = config_of(lora_dropout=0.0)
    plain = make(config, get_peft_model)
    args = arguments_of(options, tmp_path / "plain", keep=False)
    trainer = Trainer(plain, args, default_collator(plain), rows, callbacks=[PeftSchedule(plain)])
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = make(config)
    metrics = train(ours, rows, options, output_dir=tmp_path / "ours", progress=False)
    found = [loss for _, loss in metrics["losses"]]
    assert len(found) == STEPS
    assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() <= 1e-5 * max(expected)
    folder = tmp_path / "ours"
    pattern = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    theirs = plain.peft_config["default"].rank_pattern
    assert pattern == {name.removesuffix(".default"): ranks for name, ranks in theirs.items()}
    assert len({sum(ranks) for ranks in pattern.values()}) > 1


def test_a_masked_training_writes_open_modules_alone_and_plain_peft_loads_them(
    make, rows, options, tmp_path, tiny_model_folder
):
    ours = make()
    ila.apply_mask(ours, mask_over(ours))
    metrics = train(ours, rows, options, held_out=rows, output_dir=tmp_path, progress=False)
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    names = {n for n, m in loaded.named_modules() if hasattr(m, "lora_E")}
    assert names == set(mask_over(make()).open)
    # The loss on held-out rows counts tokens, and nothing of the regularisation.
    bare = held_out_loss(loaded.get_base_model(), rows, default_collator(base), 2)
    assert metrics["held_out_loss"] == pytest.approx(bare, rel=1e-5)


@pytest.mark.parametrize("call", [2, 4])
def test_a_broken_run_goes_on_as_if_it_had_not_been(
    make, rows, options, tmp_path, break_off, killed, call
):
    def run(folder, **more):
        model = make()
        ila.apply_mask(model, mask_over(model))
        return train(model, rows, options, output_dir=folder, progress=False, **more), model

    expected, whole = run(tmp_path / "whole")
    break_off(Trainer, "_save_checkpoint", call, after=True)
    with pytest.raises(killed):
        run(tmp_path / "broken")
    found, ours = run(tmp_path / "broken", resume=True)
    assert found["losses"] == expected["losses"]
    states = [model.state_dict() for model in (whole, ours)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # A finished run gives its adapter back to a fresh model.
    again, model = run(tmp_path / "broken", resume=True)
    assert again["losses"] == expected["losses"]
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        logits = [each.eval()(ids).logits for each in (whole, model)]
    assert torch.allclose(logits[0], logits[1], atol=1e-6)


@pytest.mark.parametrize("method", ["path", "ila", "gate_gradient", "update_norm", "output_norm"])
def test_every_layer_is_scored_and_selected(make, rows, search, method):
    model = make(config_of(total_step=8, tfinal=2))
    mask = search(model, rows, method=method)
    assert len(mask) == 14 and len(set(mask.scores.values())) > 7
    counted = mask.provenance["parameters"]
    parts = {n: (m.lora_A, m.lora_B, m.lora_E) for n, m in model.named_modules() if n in counted}
    assert counted == {n: sum(p["default"].numel() for p in ps) for n, ps in parts.items()}
    chosen = mask.top(0.3)
    report = ila.apply_mask(model, chosen)
    assert len(report.open) == len(chosen.open) < 14


def test_path_scores_add_up_to_the_loss_that_the_adapter_removes(make, rows, search):
    model = make(config_of(total_step=60, lora_dropout=0.0))
    longer = {"stage1_steps": 60, "stage2_steps": 25, "learning_rate": 3e-2}
    mask = search(model, rows, method="path", **longer)
    collator = default_collator(model)
    with_adapter = held_out_loss(model, rows, collator, 2)
    with model.disable_adapter():
        without = held_out_loss(model, rows, collator, 2)
    assert without - with_adapter > 0.05
    assert sum(mask.scores.values()) == pytest.approx(without - with_adapter, rel=0.1)


def test_a_broken_search_goes_on(make, rows, search, tmp_path, break_off, killed):
    config = config_of(total_step=8, tfinal=2)
    expected = search(make(config), rows, output_dir=tmp_path / "whole")
    break_off(Trainer, "_save_checkpoint", 4, after=True)  # of stage 2
    with pytest.raises(killed):
        search(make(config), rows, output_dir=tmp_path / "broken")
    assert (tmp_path / "broken" / "stage1.json").exists()
    found = search(make(config), rows, output_dir=tmp_path / "broken", resume=True)
    assert found.scores == pytest.approx(expected.scores, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("method", ["gradient_norm", "feature_norm"])
def test_methods_that_ask_for_an_untrained_lora_are_refused(make, rows, search, method):
    with pytest.raises(ValueError, match="AdaLoRA"):
        search(make(), rows, method=method)


def test_a_selection_in_the_middle_of_a_run_is_refused(make, rows, options):
    with pytest.raises(ValueError, match="AdaLoRA"):
        train_and_select(make(), rows, options, Selection(Choice(top=0.3), 0.3, "keep", "path"))


def test_select_layers_is_refused_as_a_callback_and_works_in_a_loop(make, rows, options, tmp_path):
    model = make(config_of(lora_dropout=0.0))
    args = arguments_of(options, tmp_path, keep=False)
    callback = ila.SelectLayers(at=0.3, top=0.3)
    trainer = Trainer(model, args, default_collator(model), rows, callbacks=[callback])
    with pytest.raises(ValueError, match="AdaLoRA"):
        trainer.train()
    collate, model = default_collator(model), make(config_of(lora_dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        if step == 10:
            batches = [collate(rows[i : i + 2]) for i in range(0, 10, 2)]
            mask = ila.select_layers(model, batches, optimizer=optimizer, top=0.3)
        optimizer.zero_grad()
        model(**collate(rows[step % 5 : step % 5 + 2])).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    scored = model.base_model.rankallocator
    assert scored.init_bgt == 4 * len(mask.open) and scored.target_bgt == 2 * len(mask.open)
    moved = {n for n, p in model.named_parameters() if ".lora_E." in n and p.requires_grad}
    open_ranks = sum(int((model.get_parameter(n) != 0).sum()) for n in moved)
    assert len(moved) == len(mask.open) and open_ranks == scored.target_bgt


def test_a_packed_base_is_refused_by_name(monkeypatch, make):
    import ila.models.adalora as adalora

    monkeypatch.setattr(adalora.MaskedSvdLinear, "covers", staticmethod(lambda base: False))
    with pytest.raises(ValueError, match="became SVDLinear"):
        make()


def test_lora_has_no_schedule_of_ranks(make_llama):
    assert Adapter(make_llama()).trainer_class(Trainer) is Trainer

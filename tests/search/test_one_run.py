"""One run with a selection in its middle: the bits of the callback, through every kill."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer

import ila
from ila.masks.mask import LayerMask
from ila.models.edit import masked_layers
from ila.price.choice import Choice
from ila.search import one_run
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.training.config import TrainConfig
from ila.training.loop import run
from ila.training.train import arguments_of

STEPS, SWITCH = 8, 3
LAST_BLOCK = Selection(Choice(blocks=1), at=SWITCH)


def config(**changes):
    options = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "save_every": 2}
    return TrainConfig(**options | changes)


def go(model, rows, folder=None, selection=LAST_BLOCK, resume=False, **changes):
    return train_and_select(
        *(model, rows[:8], config(**changes), selection),
        held_out=rows[8:],
        output_dir=folder,
        resume=resume,
        progress=False,
        name="one",
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("closed", ["keep", "drop"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_ends_with_the_bits_of_the_callback(make_llama, rows, tmp_path, closed, accumulation):
    extra = {} if accumulation == 1 else {"gradient_accumulation_steps": accumulation}
    model, selection = make_llama(), Selection(Choice(blocks=1), at=SWITCH, closed=closed)
    metrics, mask = go(model, rows, tmp_path / "one", selection, training_args=extra)

    chosen = ila.SelectLayers(at=SWITCH, blocks=1, closed=closed)
    args = arguments_of(config(training_args=extra), tmp_path / "callback", keep=True)
    other = make_llama()
    trainer = Trainer(other, args, one_run.default_collator(other), rows[:8], callbacks=[chosen])
    run(trainer, None)  # with the lean head, as the one run
    assert mask.open == chosen.mask.open and mask.closed
    assert same(weights(model), weights(other))
    assert [loss for _, loss in metrics["losses"]] == [
        e["loss"] for e in trainer.state.log_history if "loss" in e
    ]
    saved = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert len(saved) == (28 if closed == "keep" else 14)


def test_the_folder_holds_what_separate_commands_leave_and_no_more(make_llama, rows, tmp_path):
    metrics, mask = go(make_llama(), rows, tmp_path, Selection(Choice(top=0.3), at=0.4))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.json"),
        *("log.jsonl", "mask.json", "selection.json", "train.json"),
    }
    assert LayerMask.load(tmp_path) == mask and len(mask.open) == 4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    saved = json.loads((tmp_path / "metrics.json").read_text())
    search = metrics["selected"]["search"]
    assert search["steps"] == SWITCH
    assert 0 < search["seconds"] and 0 < metrics["selected"]["seconds"]
    assert saved["selected"]["selection"]["step"] == SWITCH and saved["kept_modules"] == 10
    assert metrics["held_out_loss"] < metrics["held_out_loss_before"]
    again, selection = make_llama(), Selection(Choice(top=0.3), at=0.4)
    assert go(again, rows, tmp_path, selection, resume=True) == (saved, mask)
    assert sum(layer.is_open("default") for layer in masked_layers(again, "default").values()) == 4
    with pytest.raises(ValueError, match=r"differs in selection\.closed"):
        other = Selection(Choice(top=0.3), at=0.4, closed="drop")
        go(make_llama(), rows, tmp_path, other, resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        go(make_llama(), rows, tmp_path)


BREAKS = {
    "in the first part": (Trainer, "training_step", SWITCH, False),
    "before its checkpoint": (Trainer, "_save_checkpoint", 2, False),
    "after its checkpoint": (Trainer, "_save_checkpoint", 2, True),
    "before the choice": (Selection, "choose", 1, False),
    "before the switch is written": (one_run, "write_switch", 1, False),
    "before the mask is written": (LayerMask, "save", 1, False),
    "after the mask is written": (LayerMask, "save", 1, True),
    "in the second part": (Trainer, "training_step", STEPS - 1, False),
    "before the metrics": (one_run, "_finish", 1, True),
    "before the first part is removed": (one_run.shutil, "rmtree", 3, False),
}


@pytest.mark.parametrize("method", ["gate_gradient", "path"])
@pytest.mark.parametrize("place", BREAKS)
def test_broken_off_anywhere_and_resumed_it_ends_with_the_same_bits(
    make_llama, rows, tmp_path, break_off, killed, method, place
):
    selection = Selection(Choice(top=0.3), at=SWITCH, method=method, batches=5)
    whole = make_llama()
    expected, mask = go(whole, rows, tmp_path / "whole", selection)
    owner, name, call, after = BREAKS[place]
    break_off(owner, name, call, after=after)
    with pytest.raises(killed):
        go(make_llama(), rows, tmp_path / "broken", selection)
    model = make_llama()
    found, again = go(model, rows, tmp_path / "broken", selection, resume=True)
    assert dict(again.scores) == dict(mask.scores) and again.open == mask.open
    for unequal in ("step_time_ms", "peak_memory_bytes", "selected"):
        del found[unequal], expected[unequal]
    assert found == expected
    assert same(weights(model), weights(whole))
    logs = [(tmp_path / n / "log.jsonl").read_text() for n in ("whole", "broken")]
    assert logs[0] == logs[1]
    assert not (tmp_path / "broken" / "search").exists()


def test_the_cache_begins_with_the_selection(make_llama, rows):
    plain, _ = go(make_llama(), rows)
    cached, _ = go(make_llama(), rows, cache_prefix=True)
    assert plain["prefix_cache"] is None and cached["prefix_cache"]["blocks"] == 1
    one, other = (torch.tensor([loss for _, loss in m["losses"]]) for m in (plain, cached))
    assert torch.equal(one[:SWITCH], other[:SWITCH])
    assert (one - other).abs().max() <= 16 * torch.finfo(torch.float32).eps * one.max()


@pytest.mark.parametrize("kind", ["DeepSpeed", "FSDP1"])
def test_an_optimiser_that_cannot_be_filtered_is_refused(
    make_llama, rows, tmp_path, monkeypatch, kind
):
    make = one_run._all_layers

    def sharded(*arguments):
        meter, trainer = make(*arguments)
        trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = kind == "DeepSpeed", kind == "FSDP1"
        return meter, trainer

    monkeypatch.setattr(one_run, "_all_layers", sharded)
    with pytest.raises(ValueError, match="needs one process, DDP or FSDP2, got DeepSpeed or FSDP1"):
        go(make_llama(), rows, tmp_path)


def test_no_folder_leaves_no_files_and_a_closed_layer_is_refused(make_llama, rows, tmp_path):
    metrics, mask = go(make_llama(), rows)
    assert metrics["steps"] == STEPS
    model = make_llama()
    ila.apply_mask(model, mask, closed="keep")
    with pytest.raises(ValueError, match="is closed; the search needs every layer open"):
        go(model, rows)


@pytest.mark.parametrize("closed", ["keep", "drop"])
def test_plain_peft_reads_its_adapter_with_the_same_logits_and_merges_the_same(
    make_llama, rows, tmp_path, tiny_model_folder, closed
):
    def base():
        return LlamaForCausalLM.from_pretrained(tiny_model_folder).eval()

    model = make_llama()
    selection = Selection(Choice(top=0.3), at=SWITCH, closed=closed)
    _, mask = go(model, rows, tmp_path, selection, learning_rate=5e-2)
    plain = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    assert not masked_layers(plain, "default")
    ids = torch.tensor([row["input_ids"] for row in rows])
    found, expected = model.eval()(ids).logits, plain(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # logits of magnitude 3
    assert (expected - base()(ids).logits).abs().max() > 1e-2
    merged, theirs, bare = (
        m.state_dict() for m in (model.merge_and_unload(), plain.merge_and_unload(), base())
    )
    assert set(merged) == set(theirs)
    assert all(torch.equal(merged[name], theirs[name]) for name in theirs)
    names = {n: f"{n.removeprefix('base_model.model.')}.weight" for n in (*mask.open, *mask.closed)}
    changed = {n for n, name in names.items() if not torch.equal(merged[name], bare[name])}
    assert changed == (set(names) if closed == "keep" else set(mask.open))

"""Selection in the middle of a run: before and after, it is a run without it, bit for bit."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import ila
from ila.data.encoding import Collator
from ila.models.edit import masked_layers
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import GateGradient
from ila.search.in_place import shape_of

STEPS, SWITCH = 8, 3
# TRL asks transformers by names that transformers 5 is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def make_base(folder, family):
    llama = LlamaForCausalLM.from_pretrained(folder)
    if family == "llama":
        return llama
    torch.manual_seed(6)
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("vocab_size", "num_key_value_heads", "initializer_range")
    config = {name: getattr(llama.config, name) for name in shared}
    return MistralForCausalLM(MistralConfig(**config, pad_token_id=0))


@pytest.fixture
def make(tiny_model_folder):
    """Return a maker of tiny models with an adapter, always the same for a family."""

    def make(family="llama", **changes):
        base = make_base(tiny_model_folder, family)
        torch.manual_seed(5)
        options = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
        return ila.attach(base, LoraConfig(**options | {"target_modules": "all-linear"} | changes))

    return make


def options(folder, **changes):
    own = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    own |= {"logging_steps": 1, "save_steps": 1, "report_to": "none", "seed": 3, "use_cpu": True}
    own |= {"disable_tqdm": True, "dataloader_pin_memory": False, "output_dir": str(folder)}
    return own | changes


def plain_trainer(model, folder, rows, **changes):
    arguments = options(folder, remove_unused_columns=False, **changes)
    return Trainer(model, TrainingArguments(**arguments), Collator(0), rows)


def words(start, count):
    return " ".join("abcdefghijklmnopqrstuvwxyz"[(start + i) % 26] for i in range(count))


def sft_trainer(model, folder, rows, **changes):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": words(i, 4), "completion": " " + words(i + 4, 6)} for i in range(10)]
    config = SFTConfig(**options(folder, bf16=False, **changes), max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    return SFTTrainer(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def dpo_trainer(model, folder, rows, **changes):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": words(i, 4), "chosen": " " + words(i + 4, 6), "rejected": " " + words(i, 6)}
        for i in range(10)
    ]
    config = DPOConfig(**options(folder, bf16=False, **changes), max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    data = Dataset.from_list(rows)
    return DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)


class ByHand(TrainerCallback):
    """Applies a mask once Trainer has loaded a checkpoint; the optimiser loses the parameters."""

    def __init__(self, mask, closed):
        self.mask, self.closed = mask, closed

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = optimizer.optimizer
        ila.apply_mask(model, self.mask, closed=self.closed, optimizer=inner)


def outcome(trainer):
    """Losses and norms of all steps, and the trained adapter."""
    log = [e for e in trainer.state.log_history if "loss" in e]
    adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in log], adapter


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert set(found[1]) == set(expected[1])
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


def run(trainer, callback=None, resume=None):
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return outcome(trainer)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("closed", ["keep", "drop"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01},
        {"max_grad_norm": 0.0, "gradient_checkpointing": True},
    ],
    ids=["plain", "accumulated and clipped", "checkpointed"],
)
def test_before_it_is_the_run_without_and_after_it_the_mask_by_hand(
    make, rows, tmp_path, family, closed, changes
):
    chosen = ila.SelectLayers(at=SWITCH, top=0.5, closed=closed)
    trainer = plain_trainer(make(family), tmp_path / "one", rows, **changes)
    found = run(trainer, chosen)
    assert len(chosen.mask.open) == 7 and chosen.mask.provenance["selection"]["step"] == SWITCH

    without = run(plain_trainer(make(family), tmp_path / "all", rows, **changes))
    assert found[0][:SWITCH] == without[0][:SWITCH] and found[0] != without[0]
    name = f"checkpoint-{SWITCH}/adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()

    again = plain_trainer(make(family), tmp_path / "hand", rows, **changes)
    switch = tmp_path / "all" / f"checkpoint-{SWITCH}"
    assert_same(run(again, ByHand(chosen.mask, closed), switch), found)

    open_ = {p for p in trainer.model.parameters() if p.requires_grad}
    assert set(trainer.optimizer.state) == open_ and 0 < len(open_) == 14
    names = {n for n in found[1] if n.split(".lora_")[0] in chosen.mask.closed}
    assert len(names) == (14 if closed == "keep" else 0)


@pytest.mark.parametrize("closed", ["keep", "drop"])
@pytest.mark.parametrize("method", ["gate_gradient", "path"])
# A checkpoint of dropped layers has none of their adapters to load.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_resumed_before_at_and_after_the_switch_it_ends_with_the_same_bits(
    make, rows, tmp_path, closed, method
):
    def select():
        return ila.SelectLayers(at=0.4, freeze=0.5, closed=closed, method=method, batches=6)

    first = select()
    expected = run(plain_trainer(make(), tmp_path / "whole", rows), first)
    for step in (SWITCH - 1, SWITCH, SWITCH + 2):
        again, folder = select(), tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        trainer = plain_trainer(make(), folder, rows)
        assert_same(run(trainer, again, folder / f"checkpoint-{step}"), expected)
        assert again.mask == first.mask
        assert set(trainer.optimizer.state) == {p for p in trainer.model.parameters()
                                                if p.requires_grad}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("closed", ["keep", "drop"])
@pytest.mark.parametrize("kind", [sft_trainer, dpo_trainer])
def test_trainers_of_trl_select_as_trainer_does(
    make, rows, tmp_path, tiny_model_folder, family, kind, closed
):
    pytest.importorskip("trl")

    def build(folder):
        model = make(family)
        model.name_or_path = model.config._name_or_path = str(tiny_model_folder)
        return kind(model, folder, rows)

    chosen = ila.SelectLayers(at=SWITCH, blocks="last:1", closed=closed)
    found = run(build(tmp_path / "one"), chosen)
    assert all(".layers.1." in name for name in chosen.mask.open) and len(chosen.mask.open) == 7
    without = run(build(tmp_path / "all"))
    assert found[0][:SWITCH] == without[0][:SWITCH] and found[0] != without[0]
    switch = tmp_path / "all" / f"checkpoint-{SWITCH}"
    assert_same(run(build(tmp_path / "hand"), ByHand(chosen.mask, closed), switch), found)


@pytest.mark.parametrize("closed", ["keep", "drop"])
def test_the_adapter_loads_in_plain_peft_with_the_same_logits(
    make, rows, tmp_path, tiny_model_folder, closed
):
    model = make()
    run(plain_trainer(model, tmp_path / "run", rows), ila.SelectLayers(0.4, top=0.3, closed=closed))
    model.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    model.eval()
    ids = torch.tensor([row["input_ids"] for row in rows])
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    held = sum(hasattr(module, "lora_A") for module in plain.modules())
    assert held == (14 if closed == "keep" else 4)


@pytest.mark.parametrize("closed", ["keep", "drop"])
def test_the_gate_gradient_of_a_closed_layer_is_zero(make, rows, closed):
    model = make(init_lora_weights=False)
    signal = GateGradient(masked_layers(model, "default"), "default")
    mask = ila.LayerMask(dict.fromkeys(signal.layers, 0.0)).top(0.5)
    ila.apply_mask(model, mask, closed=closed)
    model(**batches_of(rows)[0]).loss.backward()
    found = dict(zip(signal.layers, signal.values(), strict=True))
    assert {name for name, value in found.items() if value != 0} == set(mask.open)


def batches_of(rows, count=6):
    return [Collator(0)(rows[i : i + 3]) for i in range(count)]


@pytest.mark.parametrize("closed", ["keep", "drop"])
def test_a_loop_selects_and_its_optimizer_forgets(make, rows, closed):
    model, batches = make(), batches_of(rows)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state, weights = torch.get_rng_state(), model.state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    mask = ila.select_layers(model, batches, optimizer=optimizer, top=0.3, closed=closed)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(mask.open) == 4 and mask.provenance["search"]["config"]["method"] == "path"
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert not any(layer.lora_S for layer in masked_layers(model, "default").values())
    model(**batches[0]).loss.backward()
    optimizer.step()


def test_scores_of_a_loop_are_those_of_the_search(make_llama, rows, search):
    """Path on the same batches in the same order; without dropout nothing is random."""
    model = make_llama(lora_dropout=0.0, init_lora_weights=False)
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    searched = search(
        model, rows, method="path", stage1_steps=1, stage2_steps=5, learning_rate=1e-9
    )
    handle.remove()
    keys = ("input_ids", "attention_mask", "labels")
    batches = [{key: batch[key] for key in keys} for batch in seen[1:]]  # stage 1 had one
    mask = ila.select_layers(model, batches, top=0.5)
    for name, score in mask.scores.items():
        assert score == pytest.approx(searched.scores[name], rel=1e-6)


def test_budgets_count_the_steps_of_the_run(make, rows, tmp_path):
    chosen = ila.SelectLayers(at=SWITCH, budget="parameters=300")
    trainer = plain_trainer(make(), tmp_path, rows)
    run(trainer, chosen)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert 0 < trained <= 300
    mask = ila.select_layers(make(init_lora_weights=False), batches_of(rows), budget="memory=1MiB")
    assert mask.open


@pytest.mark.parametrize(("labels", "answers"), [(4, 0.25), (12, 0.75), (0, 1.0), (None, 1.0)])
def test_the_step_of_a_budget_has_the_labels_of_its_batch(make, labels, answers):
    """Two rows of eight tokens; a batch without labels has its loss from elsewhere."""
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    if labels is not None:
        batch["labels"] = torch.full((2, 8), -100)
        batch["labels"][:, 1 : 1 + labels // 2] = 1
        batch["labels"][:, 0] = 1  # no token comes before it
    shape = shape_of(AdapterUpdates(make()), batch)
    assert (shape.rows, shape.length, shape.answers) == (2, 8, answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of top, freeze, budget, blocks must be given"),
        ({"top": 0.3, "blocks": 1}, "exactly one of"),
        ({"top": 1.5}, r"fraction must be in \(0, 1\]"),
        ({"freeze": 0.0}, r"freeze must be in \(0, 1\)"),
        ({"blocks": "first:2"}, "blocks must be a number"),
        ({"budget": "time=0.5"}, "budget time needs speed"),
        ({"top": 0.3, "speed": "x"}, "speed does nothing"),
        ({"top": 0.3, "at": 0.0}, "at must be a share"),
        ({"top": 0.3, "at": 1.5}, "at must be a share"),
        ({"top": 0.3, "closed": "freeze"}, "closed must be one of"),
        ({"top": 0.3, "method": "ila"}, "method must be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ila.SelectLayers(**arguments)


def test_what_cannot_be_selected_is_refused(make, rows, tmp_path, tiny_model_folder):
    def start(model, callback, name="run", resume=None):
        run(plain_trainer(model, tmp_path / name, rows), callback, resume)

    with pytest.raises(ValueError, match="at must leave steps before and after the switch"):
        start(make(), ila.SelectLayers(at=STEPS, top=0.3))
    with pytest.raises(ValueError, match="blocks must be at most 2, got 3"):
        start(make(), ila.SelectLayers(at=1, blocks=3))
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(ValueError, match="needs a PeftModel"):
        start(base, ila.SelectLayers(top=0.3))
    start(make(), ila.SelectLayers(at=2, top=0.3), "selected")
    checkpoint = tmp_path / "selected" / "checkpoint-4"
    with pytest.raises(ValueError, match="written with another SelectLayers"):
        start(make(), ila.SelectLayers(at=2, top=0.5), "other", checkpoint)
    start(make(), None, "all")
    with pytest.raises(ValueError, match="after the switch at 2, and was written without"):
        start(make(), ila.SelectLayers(at=2, top=0.3), "late", tmp_path / "all" / "checkpoint-4")
    with pytest.raises(ValueError, match="batches must be at least 5, got 2"):
        ila.select_layers(make(), batches_of(rows, 2), top=0.3)
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in batches_of(rows)]
    with pytest.raises(ValueError, match="batches must have labels"):
        ila.select_layers(make(), unlabelled, top=0.3)

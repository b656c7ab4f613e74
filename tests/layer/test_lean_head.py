"""The lean head on a model: where it is taken, where it steps aside, and the ways back."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import ila
import ila.data
from ila.models.lean_head import PLAIN, head_route, plain_head

FP64 = torch.float64
ALL = {"target_modules": "all-linear"}


def batch(tiny) -> dict[str, torch.Tensor]:
    ids = tiny.tokens()
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)}


def results(model: nn.Module, **inputs) -> dict[str, torch.Tensor]:
    """Loss and gradients, by name."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().double()}


def assert_lean(tiny, model: nn.Module, lean: bool = True) -> None:
    """Whether a loss is computed without logits; it is the plain twin's either way."""
    twin = copy.deepcopy(model)
    plain_head(twin)
    inputs = batch(tiny)
    assert (model(**inputs).logits is None) == lean
    assert (head_route(model).path != PLAIN) == lean
    tiny.assert_close(results(model, **inputs), results(twin, **inputs), 1e-6)


# --- taken


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_loss_is_computed_without_logits_and_is_the_same(pair, tiny, family):
    _, model = pair(tiny.config(**ALL), family=family)
    assert ila.lean_head(model) == head_route(model) == ila.lean_head(model)
    assert_lean(tiny, model)


def test_explain_says_who_computes_the_loss(tiny):
    model = tiny.attached(tiny.config(**ALL))
    assert ila.explain(model).head is None and "Head" not in str(ila.explain(model))
    ila.lean_head(model)
    assert ila.explain(model).head == head_route(model)
    assert f"Head and loss: {head_route(model).path}" in str(ila.explain(model))
    assert ila.explain(model).as_dict()["head"]["path"] == head_route(model).path


def test_it_may_come_before_the_adapter(tiny):
    base = tiny.base()
    ila.lean_head(base)
    for model in (
        tiny.plain(tiny.config(), copy.deepcopy(base)),
        tiny.attached(tiny.config(), base),
    ):
        assert_lean(tiny, model)


def test_a_frozen_model_of_its_own_is_evaluated_without_logits(tiny):
    model = tiny.base().requires_grad_(False)
    expected = model(**batch(tiny)).loss
    ila.lean_head(model)
    outputs = model(**batch(tiny))
    assert outputs.logits is None and not outputs.loss.requires_grad
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_masks_and_checkpoints_do_not_mind(tiny):
    model = tiny.attached(tiny.config(**ALL)).train()
    ila.lean_head(model)
    ila.apply_mask(model, tiny.mask(model, lambda i, name: "layers.0" in name or i % 2))
    expected = results(model, **batch(tiny))
    ila.gradient_checkpointing(model)
    tiny.assert_close(results(model, **batch(tiny)), expected)
    assert_lean(tiny, model)


def test_hidden_states_are_handed_on(tiny):
    model = tiny.attached(tiny.config())
    expected = model(**batch(tiny), output_hidden_states=True).hidden_states
    ila.lean_head(model)
    outputs = model(**batch(tiny), output_hidden_states=True)
    assert outputs.logits is None
    assert all(map(torch.equal, outputs.hidden_states, expected))


def test_a_trained_head_is_lean_where_no_gradient_is_wanted(tiny):
    model = tiny.attached(tiny.config(modules_to_save=None))
    model.get_base_model().lm_head.requires_grad_(True)
    ila.lean_head(model)
    with torch.no_grad():
        assert model(**batch(tiny)).logits is None
    assert_lean(tiny, model, lean=False)


# --- steps aside


def test_whoever_asks_for_logits_gets_the_plain_forward(tiny):
    model = tiny.attached(tiny.config()).eval()
    ids = tiny.tokens()
    calls = [
        {"input_ids": ids},
        {**batch(tiny), "logits_to_keep": 3, "shift_labels": ids[:, :3].contiguous()},
        {"input_ids": ids, "labels": ids, "ignore_index": 5},
    ]
    with torch.no_grad():
        expected = [model(**call) for call in calls]
        generated = model.generate(input_ids=ids[:, :4], max_new_tokens=5, do_sample=False)
        ila.lean_head(model)
        for call, outputs in zip(calls, expected, strict=True):
            again = model(**call)
            assert torch.equal(again.logits, outputs.logits)
            assert outputs.loss is None or torch.equal(again.loss, outputs.loss)
        again = model.generate(input_ids=ids[:, :4], max_new_tokens=5, do_sample=False)
    assert torch.equal(again, generated)
    loss, logits = model(**batch(tiny), return_dict=False)[:2]
    assert loss.shape == () and logits.shape == (*ids.shape, 64)


def hooked(model):
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, y: y * 1.5)


def replaced(model):
    head = model.get_base_model().lm_head
    head.forward = lambda h: nn.functional.linear(h, head.weight) * 1.5


def trained(model):
    model.get_base_model().lm_head.requires_grad_(True)


def other_loss(model):
    base = model.get_base_model()
    own = base.loss_function
    base.loss_function = lambda *args, **kwargs: 2.0 * own(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "why"),
    [(hooked, "hooks"), (replaced, "hooks"), (trained, "trained"), (other_loss, "loss function")],
)
def test_what_it_does_not_cover_is_computed_by_the_model_and_said(tiny, change, why):
    model = tiny.attached(tiny.config())
    before = model(**batch(tiny)).loss
    change(model)
    ila.lean_head(model)
    assert why in head_route(model).reason
    assert_lean(tiny, model, lean=False)
    assert change is trained or model(**batch(tiny)).loss != before


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize("first", [True, False], ids=["lean first", "adapter first"])
def test_an_adapted_head_is_trained_by_its_own_code(tiny, changes, first):
    base = tiny.base()
    if first:
        ila.lean_head(base)
    model = tiny.attached(tiny.config(**changes), base)
    if not first:
        ila.lean_head(model)
    assert "adapted" in head_route(model).reason
    assert any("lm_head" in name for name in results(model, **batch(tiny)))
    assert_lean(tiny, model, lean=False)


def test_tied_embeddings_that_are_trained_get_both_gradients(tiny):
    model = tiny.base(tie_word_embeddings=True)
    ila.lean_head(model)
    assert "trained" in head_route(model).reason
    assert_lean(tiny, model, lean=False)


class OwnForward(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def replaced_forward(tiny):
    model = tiny.base()
    model.forward = model.forward
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tiny: nn.Linear(2, 3), "must hold a causal language model"),
        (lambda tiny: LlamaForSequenceClassification(tiny.base().config), "must hold a causal"),
        (lambda tiny: OwnForward(tiny.base().config), "forward of OwnForward is not known"),
        (lambda tiny: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2)), "must hold"),
        (replaced_forward, "replaced on the instance"),
    ],
)  # fmt: skip
def test_models_that_it_does_not_know_are_refused_unchanged(tiny, make, message):
    model = make(tiny)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        ila.lean_head(model)
    assert tiny.snapshot(model) == before
    assert head_route(model) is None and not plain_head(model)


def test_a_partitioned_head_takes_the_code_that_runs_its_hooks(tiny):
    model = tiny.attached(tiny.config())
    expected = results(model, **batch(tiny))
    ila.lean_head(model)
    head = model.get_base_model().lm_head
    whole, nothing = head.weight.data, torch.empty(0, dtype=FP64)

    def bring(*_):
        head.weight.data = whole

    def take(*_):
        head.weight.data = nothing

    take()
    assert "partitioned" in head_route(model).reason
    head.register_forward_pre_hook(bring)
    assert "hooks" in head_route(model).reason
    tiny.assert_close(results(model, **batch(tiny)), expected)


# --- the ways back


@pytest.mark.parametrize("kind", ["plain", "attached", "converted"])
def test_restore_gives_back_the_model_that_was(tiny, kind):
    model = tiny.plain(tiny.config())
    before = tiny.snapshot(model)
    if kind == "converted":
        ila.convert(model)
    ila.lean_head(model)
    assert tiny.snapshot(model) != before
    report = ila.restore(model)
    assert report.head and "head" in str(report)
    assert tiny.snapshot(model) == before
    with pytest.raises(ValueError, match="no lean head"):
        ila.restore(model)


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("kind", ["plain", "attached"])
def test_peft_takes_it_off_with_the_adapter(tiny, way, kind):
    model = getattr(tiny, kind)(tiny.config())
    ila.lean_head(model)
    base = getattr(model, way)()
    assert type(base) is LlamaForCausalLM and head_route(base) is None
    assert "forward" not in vars(base) and base(**batch(tiny)).logits is not None
    assert not any(callable(v) for m in base.modules() for n, v in vars(m).items() if "unload" in n)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_lean_models_of_their_own(tiny, make):
    model = tiny.attached(tiny.config())
    ila.lean_head(model)
    twin = make(model)
    with torch.no_grad():
        twin.get_base_model().lm_head.weight.zero_()
    assert twin(**batch(tiny)).logits is None
    assert twin(**batch(tiny)).loss.item() == pytest.approx(torch.tensor(64.0).log().item())
    assert_lean(tiny, model)
    assert plain_head(twin)
    assert twin(**batch(tiny)).logits is not None and model(**batch(tiny)).logits is None


def test_a_norm_that_is_trained_as_a_copy_is_no_hindrance(tiny):
    base = tiny.base()
    ila.lean_head(base)
    model = tiny.plain(tiny.config(modules_to_save=["norm"]), base)
    assert_lean(tiny, model)
    assert plain_head(model) and model(**batch(tiny)).logits is not None
    assert not any("unload_and_optionally_merge_module" in vars(m) for m in model.modules())


def test_a_replica_for_another_device_runs_its_own_forward(tiny):
    """As DataParallel makes it: attributes are copied, parameters become tensors."""
    model = tiny.base().requires_grad_(False)
    ila.lean_head(model)
    replica = model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica and model.forward.__self__ is model
    replica.lm_head = model.lm_head._replicate_for_data_parallel()
    replica.lm_head._parameters["bias"] = None
    replica.lm_head.weight = torch.zeros(64, 32, dtype=FP64)
    outputs = replica(**batch(tiny))
    assert outputs.logits is None
    assert outputs.loss.item() == pytest.approx(torch.tensor(64.0).log().item())
    replica.lm_head.weight = replica.lm_head.weight.requires_grad_()
    replica(**batch(tiny)).loss.backward()
    assert replica.lm_head.weight.grad.any()


def test_a_forward_wrapped_by_others_is_plain_once_it_is_undone(tiny):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of another test's Trainer
    model = tiny.base().requires_grad_(False)
    ila.lean_head(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert prepared(**batch(tiny)).logits is None
    plain_head(model)
    assert prepared(**batch(tiny)).logits is not None
    AcceleratorState._reset_state(reset_partial_state=True)


# --- with others


def rows(tiny) -> list[dict]:
    """Of different lengths and counts of answers; one has none."""
    result = []
    for number, ids in enumerate(tiny.tokens(8, 9).tolist()):
        ids = ids[: 5 + number % 4]
        prompt = len(ids) if number == 3 else 1 + number % 3 * 2
        result.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "extra": 1})
    return result


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Pad on the right; Trainer has dropped the column that the model does not take."""
    assert all(set(row) == {"input_ids", "labels"} for row in batch)
    return ila.data.Collator(0)(batch)


def train(tiny, folder, lean: bool, dtype=FP64, **options) -> tuple[list[float], nn.Module]:
    model = tiny.attached(tiny.config(), tiny.base(dtype=dtype))
    if lean:
        ila.lean_head(model)
    arguments = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip

    from datasets import Dataset

    trainer = Trainer(
        model,
        TrainingArguments(**arguments | options),
        collate,
        Dataset.from_list(rows(tiny)),
        eval_dataset=Dataset.from_list(rows(tiny)),
    )
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return [*losses, trainer.evaluate()["eval_loss"]], model


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing_factor": 0.1}, {"average_tokens_across_devices": False}]
)
def test_trainer_counts_accumulates_and_smooths_as_it_does(tiny, tmp_path, options):
    (plain, theirs), (lean, ours) = (train(tiny, tmp_path, on, **options) for on in (False, True))
    assert lean == pytest.approx(plain, rel=1e-5)
    assert head_route(ours).path != PLAIN
    tiny.assert_close(tiny.state_of(ours), tiny.state_of(theirs), 1e-5)


def test_trainer_in_mixed_precision(tiny, tmp_path):
    (plain, _), (lean, _) = (
        train(tiny, tmp_path, on, dtype=torch.float32, bf16=True) for on in (False, True)
    )
    assert lean == pytest.approx(plain, rel=2**-8)


def test_compiled_whole_for_every_length(tiny):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny.attached(tiny.config(target_modules=["q_proj"]), tiny.base(num_hidden_layers=1))
    ila.lean_head(model)
    plain = [results(model, **inputs) for inputs in lengths(tiny)]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs, expected in zip(lengths(tiny), plain, strict=True):
        actual = results(compiled, **inputs)
        actual = {name.removeprefix("_orig_mod."): tensor for name, tensor in actual.items()}
        tiny.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def lengths(tiny) -> list[dict[str, torch.Tensor]]:
    tokens = [tiny.tokens(2, n) for n in (9, 14, 11)]
    return [
        {"input_ids": ids, "labels": ids.where(torch.arange(ids.shape[1]) >= 4, -100)}
        for ids in tokens
    ]


TWO = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from peft import LoraConfig
from transformers import LlamaForCausalLM
import ila
import ila.data
from ila.models.lean_head import head_route
from ila.models import lean_forward as home

folder, out, kind = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = LlamaForCausalLM.from_pretrained(folder).double()
options = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
config = LoraConfig(r=2, target_modules="all-linear", **options)
model = ila.attach(model, config, autocast_adapter_dtype=False).double()
if kind != "plain":
    ila.lean_head(model)
calls = []
own = home.cross_entropy_sum
home.cross_entropy_sum = lambda *args: calls.append(1) or own(*args)
if kind == "ddp":
    run = DistributedDataParallel(model)
elif kind == "fsdp":
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    run = fully_shard(model, mesh=mesh)
else:
    run = model
ids = torch.arange(40).remainder(30).view(4, 10)
labels = ids.masked_fill(torch.arange(10) < 4, -100)
mine = slice(None) if kind == "plain" else slice(2 * rank, 2 * rank + 2)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
losses = []
for step in range(3):
    loss = run(input_ids=ids[mine], labels=labels[mine]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = loss.detach().clone()
    dist.all_reduce(value)
    losses.append(value.item() / 2)
route = head_route(model)
open(f"{out}-{rank}.json", "w").write(json.dumps([losses, len(calls), route and route.path]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(run_ranks, tiny_model_folder, tmp_path, kind):
    for name in ("plain", kind):
        run_ranks(TWO, tiny_model_folder, tmp_path / name, name)
    plain, ours = (json.loads((tmp_path / f"{n}-0.json").read_text()) for n in ("plain", kind))
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert (plain[1], ours[1]) == (0, 3)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trl_takes_its_own_head_and_logits_stay_where_it_wants_them(tiny_model_folder, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    def run(lean: bool) -> list[float]:
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
        if lean:
            ila.lean_head(base)
        data = Dataset.from_list([{"prompt": "a b c", "completion": f" d e {c}"} for c in "fghij"])
        config = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=3, logging_steps=1, report_to="none", use_cpu=True,
            bf16=False, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=base,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )
        trainer.train()
        return [e["loss"] for e in trainer.state.log_history if "loss" in e]

    assert run(True) == pytest.approx(run(False), rel=1e-5)

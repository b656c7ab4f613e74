"""Counted costs against what autograd keeps, and what a mask must not name."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ila
from benchmarks.memory.kept import saved_bytes
from benchmarks.memory.true_size import fake
from ila.price.costs import (
    ceiling_price,
    fixed_work,
    head_work,
    memory_table,
    parameter_table,
    time_table,
)
from ila.price.shapes import COUNTED, SAME_LAYERS, Shape, check_counted
from ila_kernels.roofline import CEILINGS

BLOCKS, ROWS, LENGTH, RANK = 2, 2, 40, 3


SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
    "use_cache": False,
}  # fmt: skip


def config() -> LlamaConfig:
    made = LlamaConfig(**SIZES)
    made._attn_implementation = "sdpa"
    return made


def adapted(dtype: torch.dtype, base: torch.nn.Module | None = None) -> torch.nn.Module:
    with torch.device("meta"):
        base = (LlamaForCausalLM(config()) if base is None else base).to(dtype).train()
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return ila.attach(base, lora, low_cpu_mem_usage=True)


def layers_of(model: torch.nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, ila.MaskedLoraLinear)]


def shape_of(dtype: torch.dtype) -> Shape:
    options = {"rank": RANK, "rows": ROWS, "length": LENGTH, "base_bytes": dtype.itemsize}
    return Shape.of(config().to_dict(), **options)


def held(model: torch.nn.Module, opened: set[str]) -> int:
    """Weights, adapters, gradients and moments, and what autograd keeps of a step."""
    frozen = sum(p.numel() * p.element_size() for p in model.parameters())
    names = layers_of(model)
    ila.apply_mask(model, ila.LayerMask(dict.fromkeys(names, 0.0), {n: n in opened for n in names}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ila.lean_head(model)
    with FakeTensorMode():
        fake(model)
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        kept = saved_bytes(model, lambda: model(input_ids=ids, labels=ids).loss)
    return frozen + 12 * trained + sum(kept.values())


def counted_too_high(places: set[int], shape: Shape) -> int:
    """The two cases that the docstring of ``ila.price.costs`` names."""
    lowest, last = min(places), 7 * (BLOCKS - 1)
    rotated = lowest < last or bool(places & {last, last + 1})
    block = 7 * (lowest // 7)
    inside = {place - block for place in places if place < block + 7}
    over = 0 if rotated else 2 * LENGTH * shape.head_dim * shape.base_bytes
    return over + (shape.tokens * shape.mlp * shape.base_bytes if inside == {5} else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=12)  # 0.2 s each
@given(places=st.sets(st.integers(0, 7 * BLOCKS - 1), min_size=1, max_size=5))
@example(places={12})
@example(places={9, 10})
@example(places=set(range(7 * BLOCKS)))
def test_memory_is_what_training_holds_to_the_byte(dtype, places):
    model, shape = adapted(dtype), shape_of(dtype)
    names = layers_of(model)
    opened = {names[place] for place in places}
    counted = memory_table(shape, names).cost(opened)
    assert counted - held(model, opened) == counted_too_high(places, shape)


def test_parameters_are_those_of_the_open_layers():
    model, shape = adapted(torch.bfloat16), shape_of(torch.bfloat16)
    names = layers_of(model)
    ila.apply_mask(model, ila.LayerMask(dict.fromkeys(names, 0.0), {n: "k_" in n for n in names}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = parameter_table(shape, names)
    assert table.cost({n for n in names if "k_" in n}) == trained
    assert table.cost(set()) == 0


def flops_of(base: LlamaForCausalLM, labels: torch.Tensor) -> int:
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        base(input_ids=ids, labels=labels, shift_labels=labels).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("answers", [1.0, 0.5, 0.05])
def test_the_head_of_a_step_is_counted_by_its_labels(answers):
    """Products of the head alone: from a step, those of a step with one label are taken."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config()).bfloat16().requires_grad_(False).train()
    base.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    ila.lean_head(base)
    labels = torch.ones(ROWS, LENGTH, dtype=torch.long)
    one, some = labels.clone().fill_(-100), labels.clone()
    one[0, 0] = 1
    some.view(-1)[round(answers * labels.numel()) :] = -100
    shapes = [replace(shape_of(torch.bfloat16), answers=a) for a in (answers, 1 / labels.numel())]
    more, least = (sum(work.flops for work in fixed_work(shape)) for shape in shapes)
    assert more - least == flops_of(base, some) - flops_of(base, one)
    assert head_work(shapes[1]).flops == 4 * SIZES["vocab_size"] * SIZES["hidden_size"]


@pytest.mark.parametrize("answers", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_of_labels_is_above_0_and_at_most_1(answers):
    with pytest.raises(ValueError, match=r"answers must be in \(0, 1\]"):
        Shape.of(config().to_dict(), rank=1, rows=1, length=1, answers=answers)


def test_time_grows_with_depth_and_with_every_layer_opened():
    shape = shape_of(torch.bfloat16)
    names = layers_of(adapted(torch.bfloat16))
    table = time_table(shape, names, ceiling_price(CEILINGS["NVIDIA L4"]), 7)
    costs = [table.cost({name}) for name in names]
    assert costs[:7] > costs[7:] and min(costs[:7]) > max(costs[7:])
    assert table.cost(set()) == 7
    assert all(table.cost({names[0], name}) > costs[0] for name in names[1:])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lm_head"], "got 'lm_head'"),
        (["layers.0.mlp.experts"], "got 'layers.0.mlp.experts'"),
        (["layers.2.q_proj"], "in none of the model's 2 blocks"),
        (["layers.0.q_proj", "other.0.q_proj"], "have the same place"),
    ],
)
def test_layers_of_another_model_are_refused(names, said):
    with pytest.raises(ValueError, match=said):
        parameter_table(shape_of(torch.bfloat16), names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": None}, "no intermediate_size"),
        ({"rows": 0}, "rows must be ≥ 1, got 0"),
    ],
)
def test_another_architecture_or_no_tokens_are_refused(change, said):
    given_ = {"rank": 1, "rows": 1, "length": 1}
    found = config().to_dict() | change
    with pytest.raises(ValueError, match=said):
        Shape.of(found, **{name: change.get(name, value) for name, value in given_.items()})


def family(kind: str, **changes: bool) -> torch.nn.Module:
    """A tiny model of another family on the meta device, as large as the Llama here."""
    made = AutoConfig.for_model(kind, **SIZES, pad_token_id=0, **changes)
    made._attn_implementation = "eager" if kind == "gemma2" else "sdpa"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("kind", SAME_LAYERS)
def test_parameters_of_families_whose_layers_are_llamas(kind):
    base = family(kind)
    check_counted(base.config.to_dict(), "parameters")
    options = {"rank": RANK, "rows": ROWS, "length": LENGTH}
    shape, model = Shape.of(base.config.to_dict(), **options), adapted(torch.bfloat16, base)
    names = layers_of(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(names) == 7 * BLOCKS and parameter_table(shape, names).cost(set(names)) == trained


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, {}) for kind in COUNTED), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_memory_of_every_counted_family(kind, changes):
    base = family(kind, **changes)
    check_counted(base.config.to_dict(), "memory")
    options = {"rank": RANK, "rows": ROWS, "length": LENGTH, "base_bytes": 2}
    shape, model = Shape.of(base.config.to_dict(), **options), adapted(torch.bfloat16, base)
    names = layers_of(model)
    assert memory_table(shape, names).cost(set(names)) == held(model, set(names))


@pytest.mark.parametrize(
    ("kind", "changes", "what", "said"),
    [
        *((kind, {}, "memory", "parameters=… counts it") for kind in SAME_LAYERS[len(COUNTED) :]),
        ("qwen3", {}, "time", "time of a step is counted for the model types llama, mistral"),
        *(("mixtral", {}, what, "this model is 'mixtral'") for what in ("memory", "parameters")),
        *((kind, {}, "parameters", f"is '{kind}'") for kind in ("qwen3_moe", "olmoe", "gpt2")),
        ("llama", {"hidden_act": "gelu"}, "memory", "this model has 'gelu'"),
        (None, {}, "memory", "this model is None"),
    ],
)
def test_what_the_formulas_do_not_count_is_refused(kind, changes, what, said):
    found = {"model_type": kind, "hidden_act": "silu", **changes}
    with pytest.raises(ValueError, match=said):
        check_counted(found, what)

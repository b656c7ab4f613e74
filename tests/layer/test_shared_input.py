"""q, k and v, gate and up as one op: who takes part, the same numbers, and always a way back."""

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import ila
from ila.models import shared_input
from ila.models.attention import FusedQkv
from ila.models.class_swap import Swapped, swapped

BF16, FP64 = torch.bfloat16, torch.float64
LAYER = "base_model.model.model.layers.0"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
ALL = {"target_modules": "all-linear"}
FAMILIES = ["llama", "mistral", "qwen3", "olmo2", "gemma2"]
THREE = ["llama", "qwen3", "gemma2"]
CLOSED = [[], ["q_proj"], ["k_proj", "up_proj"]]
ROWS = 12  # of 7 tokens: more than the 64 below which calls stay apart on a CPU


@pytest.fixture
def groups(monkeypatch) -> list[list[bool]]:
    """Which members of each op of this test had an adapter."""
    seen: list[list[bool]] = []
    real = shared_input.masked_lora_linear_group

    def count(x, weights, lora_as, *args, **kwargs):
        seen.append([a is not None for a in lora_as])
        return real(x, weights, lora_as, *args, **kwargs)

    monkeypatch.setattr(shared_input, "masked_lora_linear_group", count)
    return seen


@pytest.fixture
def apart(monkeypatch):
    """Run a function while every layer computes for itself."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(shared_input, "group_pays", lambda *arguments: False)
            return function()

    return run


def close(tiny, model, *kinds: str) -> None:
    ila.apply_mask(model, tiny.mask(model, lambda i, name: name.rpartition(".")[2] in kinds))


def attentions(model: nn.Module) -> list[str]:
    return list(swapped(model, FusedQkv))


def no_traces(model: nn.Module) -> bool:
    return not any(getattr(module, "_shared_input", None) for module in model.modules())


# --- the same numbers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_layers_apart_and_of_peft(
    pair, tiny, family, bias, groups, apart
):
    changes = {"attention_bias": True} if bias and family != "mistral" else {}
    plain, ours = pair(tiny.config(**ALL), family=family, **changes)
    ids = tiny.tokens(ROWS)
    together = tiny.run(ours, input_ids=ids)
    assert groups == [[True] * 3, [True] * 2] * 2
    tiny.assert_close(together, apart(lambda: tiny.run(ours, input_ids=ids)))
    assert len(groups) == 4
    tiny.assert_close(together, tiny.run(plain, input_ids=ids))
    assert len(together) == 1 + 2 * 14
    assert no_traces(ours)


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        # Nothing asks for the gradient of the first block's x: there a bare layer shares nothing.
        (["k_proj"], [[True, True], [True, True], [True, False, True], [True, True]]),
        (["q_proj", "v_proj"], [[True, True], [False, True, False], [True, True]]),
        (["q_proj", "k_proj", "v_proj"], [[True, True], [True, True]]),
        (["gate_proj"], [[True] * 3, [False, True], [True] * 3, [False, True]]),
        (["gate_proj", "up_proj"], [[True] * 3, [True] * 3]),
    ],
)
def test_a_closed_layer_shares_the_gradient_of_x_only(tiny, closed, expected, groups, apart):
    model = tiny.attached(tiny.config(**ALL))
    before = tiny.run(model, input_ids=tiny.tokens(ROWS))
    groups.clear()
    close(tiny, model, *closed)
    masked = tiny.run(model, input_ids=tiny.tokens(ROWS))
    assert groups == expected
    tiny.assert_close(masked, apart(lambda: tiny.run(model, input_ids=tiny.tokens(ROWS))))
    assert tiny.differs(masked, before)


def test_a_closed_layer_is_the_bare_linear_bit_for_bit(tiny, groups):
    model = tiny.attached(tiny.config(**ALL), tiny.base(dtype=BF16))
    close(tiny, model, "k_proj")
    outputs = {}
    block = model.get_submodule(ATTENTION)
    x = torch.randn(90, 32, dtype=BF16, requires_grad=True)
    with shared_input.sharing(block, ("q_proj", "k_proj", "v_proj")):
        for name in ("q_proj", "k_proj"):
            outputs[name] = block.get_submodule(name)(x)
    assert groups == [[True, False, True]]
    assert torch.equal(outputs["k_proj"], block.k_proj.base_layer(x))


def test_scores_get_the_same_gradients(tiny, groups, apart):
    model = tiny.attached(tiny.config(**ALL))
    model.requires_grad_(False)
    for layer in tiny.layers(model).values():
        layer.lora_S["default"] = nn.Parameter(torch.full((1,), 0.4, dtype=FP64))
    together = tiny.run(model, input_ids=tiny.tokens(ROWS))
    assert len(groups) == 4
    assert len(together) == 1 + 14
    tiny.assert_close(together, apart(lambda: tiny.run(model, input_ids=tiny.tokens(ROWS))))


@pytest.mark.parametrize("closed", CLOSED)
def test_dropout_draws_the_masks_that_layers_apart_draw(tiny, closed, groups, apart):
    model = tiny.attached(tiny.config(**ALL, lora_dropout=0.3)).train()
    close(tiny, model, *closed)

    def run():
        torch.manual_seed(5)
        return tiny.run(model, input_ids=tiny.tokens(ROWS))

    together = run()
    assert groups
    tiny.assert_close(together, apart(run))
    assert tiny.differs(together, tiny.run(model.eval(), input_ids=tiny.tokens(ROWS)))


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", THREE)
def test_recomputed_under_checkpointing(tiny, family, use_reentrant, closed, groups):
    """A reentrant one runs forward without gradients first, where closed layers take no part."""
    model = tiny.attached(tiny.config(**ALL, lora_dropout=0.3), tiny.base(family)).train()
    close(tiny, model, *closed)
    model.enable_input_require_grads()

    def run():
        torch.manual_seed(5)
        return tiny.run(model, input_ids=tiny.tokens(ROWS))

    expected, once = run(), len(groups)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    tiny.assert_close(run(), expected)
    assert len(groups) > 2 * once > 0
    assert no_traces(model)


def test_autocast(tiny, groups, apart):
    model = tiny.attached(tiny.config(**ALL), tiny.base(dtype=torch.float32))

    def run():
        with torch.autocast("cpu", dtype=BF16):
            return tiny.run(model, input_ids=tiny.tokens(ROWS))

    together = run()
    assert len(groups) == 4
    tiny.assert_close(together, apart(run), tolerance=0.05)
    assert tiny.differs(together, tiny.run(model, input_ids=tiny.tokens(ROWS)))


def test_packed_bases(tiny, tmp_path, groups, apart):
    pytest.importorskip("bitsandbytes")
    tiny.base(dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": how, "dtype": torch.float32, "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **options).train()
    model = tiny.attached(tiny.config(**ALL), base)
    together = tiny.run(model, input_ids=tiny.tokens(ROWS))
    assert groups == [[True] * 3, [True] * 2] * 2
    alone = apart(lambda: tiny.run(model, input_ids=tiny.tokens(ROWS)))
    tiny.assert_close(together, alone, tolerance=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", THREE)
def test_compiled_into_one_graph(tiny, family, dynamic, apart):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    expected = tiny.run(model, input_ids=tiny.tokens(ROWS))
    ops: list[str] = []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if "ila." in str(node.target))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    result = tiny.run(compiled, input_ids=tiny.tokens(ROWS))
    plain_names = {name.removeprefix("_orig_mod."): value for name, value in result.items()}
    tiny.assert_close(plain_names, expected)
    assert ops.count("ila.masked_lora_linear_group") == 4
    assert ops.count("ila.masked_lora_linear") == 4  # o_proj and down_proj
    assert no_traces(model)


def test_without_gradients_only_adapters_share_a_read(tiny, groups, apart):
    model = tiny.attached(tiny.config(**ALL)).eval()
    close(tiny, model, "k_proj")
    ids = tiny.tokens(ROWS)
    with torch.no_grad():
        together = model(input_ids=ids).logits
        assert groups == [[True, True]] * 4
        alone = apart(lambda: model(input_ids=ids).logits)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_in_inference_mode_layers_stay_apart(tiny, groups):
    """Changes in place are not counted there, so a y of before one could be handed out."""
    block = tiny.attached(tiny.config(**ALL)).get_submodule(MLP)
    with torch.inference_mode(), shared_input.sharing(block, ("gate_proj", "up_proj")):
        x = torch.randn(90, 32, dtype=FP64)
        block.gate_proj(x)
        x.mul_(2)
        assert torch.equal(block.up_proj(x), block.up_proj(x.clone()))
    assert groups == []


# --- what is kept


def test_x_is_kept_once_and_no_more_than_apart(tiny, groups, apart):
    block = tiny.attached(tiny.config(**ALL)).get_submodule(MLP)
    x = torch.randn(90, 32, dtype=FP64, requires_grad=True)

    def kept():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x).sum().backward()
        return storages[x.untyped_storage().data_ptr()], sum(storages.values())

    together = kept()
    assert groups == [[True, True]]
    assert together == apart(kept)


# --- who computes for itself


@pytest.mark.parametrize("rows", [1, 9])
def test_few_rows_stay_apart_on_a_cpu(tiny, rows, groups):
    tiny.run(tiny.attached(tiny.config(**ALL)), input_ids=tiny.tokens(rows))
    assert groups == []


def merged(tiny, model):
    model.merge_adapter()


def two_adapters(tiny, model):
    model.add_adapter("second", tiny.config(**ALL))
    model.base_model.set_adapter(["default", "second"])


def disabled(tiny, model):
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("change", [merged, two_adapters, disabled])
def test_where_peft_computes_nothing_is_shared(tiny, change, groups, apart):
    model = tiny.attached(tiny.config(**ALL))
    change(tiny, model)
    result = tiny.run(model, input_ids=tiny.tokens(ROWS))
    assert groups == []
    tiny.assert_equal(result, apart(lambda: tiny.run(model, input_ids=tiny.tokens(ROWS))))
    assert ila.explain(model).together == {}


def dora_on_k(tiny, model):
    model.add_adapter("second", tiny.config(target_modules=["k_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])


def dropout_of_its_own(tiny, model):
    for name, layer in tiny.layers(model).items():
        layer.lora_dropout["default"] = nn.Dropout(0.5 if "k_proj" in name else 0.1)


def doubled(module, args):
    return (args[0] * 2,)


def hook_on_k(tiny, model):
    for name, layer in tiny.layers(model).items():
        if "k_proj" in name:
            layer.register_forward_pre_hook(doubled)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(hook_on_k, [True, True]), (dora_on_k, [True, True]), (dropout_of_its_own, None)],
)
def test_one_that_differs_is_left_out(tiny, change, expected, groups, apart):
    model = tiny.attached(tiny.config(target_modules=["q_proj", "k_proj", "v_proj"])).train()
    change(tiny, model)

    def run():
        torch.manual_seed(5)
        return tiny.run(model, input_ids=tiny.tokens(ROWS))

    together = run()
    assert groups == ([] if expected is None else [expected] * 2)
    told = {} if expected is None else dict.fromkeys(attentions(model), ("q_proj", "v_proj"))
    assert ila.explain(model).together == told
    tiny.assert_close(together, apart(run))


def test_explain_tells_what_computes_together(tiny, groups):
    model = tiny.attached(tiny.config(**ALL))
    close(tiny, model, "k_proj")
    model.get_submodule(f"{ATTENTION}.k_proj").base_layer.register_forward_hook(lambda *a: None)
    told = ila.explain(model, 84).together
    assert told == {
        ATTENTION: ("q_proj", "v_proj"),
        ATTENTION.replace("0", "1"): ("q_proj", "k_proj", "v_proj"),
        MLP: ("gate_proj", "up_proj"),
        MLP.replace("0", "1"): ("gate_proj", "up_proj"),
    }
    tiny.run(model, input_ids=tiny.tokens(ROWS))
    assert sorted(map(len, groups)) == sorted(map(len, told.values()))
    assert ila.explain(model, 64).together == {}


def test_dense_and_packed_bases_stay_apart(tiny, tmp_path, groups):
    """Under autocast bitsandbytes' layers keep the dtype of x and dense ones do not."""
    pytest.importorskip("bitsandbytes")
    tiny.base(dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    skipped = {"llm_int8_skip_modules": ["k_proj", "lm_head"]}
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **skipped)
    options = {"quantization_config": how, "dtype": torch.float32, "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **options).train()
    model = tiny.attached(tiny.config(**ALL), base)
    tiny.run(model, input_ids=tiny.tokens(ROWS))
    assert groups == [[True, True]] * 2  # gate and up
    assert set(ila.explain(model).together.values()) == {("gate_proj", "up_proj")}


@pytest.mark.parametrize("family", THREE)
def test_a_forward_that_a_hook_has_bound_survives_the_way_back(tiny, family):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    for name in (ATTENTION, MLP):
        add_hook_to_module(model.get_submodule(name), ModelHook())
    ids = tiny.tokens(ROWS)
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-10)


# Dynamo tells of what layers know for the time of a forward.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("family", THREE)
def test_exported_for_any_number_of_rows(tiny, family, strict):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    block = model.get_submodule(MLP).requires_grad_(False)
    rows = torch.export.Dim("rows", min=2, max=4096)
    x = torch.randn(90, 32, dtype=FP64)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: rows},), strict=strict)
    few = torch.randn(5, 32, dtype=FP64)
    for each in (x, few):
        torch.testing.assert_close(exported.module()(each), block(each), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", THREE)
def test_a_hook_for_all_modules_is_seen_by_each(tiny, family, groups, apart):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    expected = tiny.run(model, input_ids=tiny.tokens(ROWS))

    def add_to_k(module, args):
        return (args[0] + 2,) if module is model.get_submodule(f"{ATTENTION}.k_proj") else None

    handle = nn.modules.module.register_module_forward_pre_hook(add_to_k)
    try:
        together = tiny.run(model, input_ids=tiny.tokens(ROWS))
        tiny.assert_close(together, apart(lambda: tiny.run(model, input_ids=tiny.tokens(ROWS))))
    finally:
        handle.remove()
    assert tiny.differs(together, expected)


@pytest.fixture
def pair_of_layers(tiny) -> Iterator[tuple[nn.Module, nn.Module]]:
    block = tiny.attached(tiny.config(**ALL)).get_submodule(MLP)
    with shared_input.sharing(block, ("gate_proj", "up_proj")):
        yield block.gate_proj, block.up_proj


def test_another_x_and_a_second_call_compute_anew(pair_of_layers, groups):
    gate, up = pair_of_layers
    x = torch.randn(90, 32, dtype=FP64)
    other = x + 1
    gate(x)
    assert len(groups) == 1
    other_y = up(other)
    first, second = up(x), up(x)
    assert first is not second
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert len(groups) == 1
    for y, at in ((other_y, other), (first, x)):
        update = up.lora_B["default"](up.lora_A["default"](at))
        expected = up.base_layer(at) + up.scaling["default"] * update
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_an_output_of_before_a_change_in_place_is_not_handed_out(pair_of_layers, groups):
    gate, up = pair_of_layers
    with torch.no_grad():
        x = torch.randn(90, 32, dtype=FP64)
        gate(x)
        x.mul_(2)
        assert torch.equal(up(x), up(x.clone()))
    assert len(groups) == 1


def test_an_error_leaves_nothing_behind(tiny):
    model = tiny.attached(tiny.config(**ALL))
    with pytest.raises(ValueError, match="weight"):
        model.get_submodule(MLP)(torch.randn(90, 31, dtype=FP64))
    assert no_traces(model)
    assert len(tiny.run(model, input_ids=tiny.tokens(ROWS))) == 1 + 2 * 14


def test_threads_do_not_see_each_others_x(tiny):
    model = tiny.attached(tiny.config(**ALL)).eval()
    inputs = [tiny.tokens(ROWS).roll(shift, 1) for shift in range(4)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]
    wrong = []

    def serve(at):
        with torch.no_grad():
            for _ in range(20):
                logits = model(input_ids=inputs[at]).logits
                if not torch.allclose(logits, expected[at], rtol=1e-10, atol=1e-10):
                    wrong.append(at)

    threads = [threading.Thread(target=serve, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert no_traces(model)


# --- which blocks, and the way back


def test_report_names_the_blocks_and_restore_undoes_them(tiny):
    model = tiny.plain(tiny.config(target_modules=["q_proj", "v_proj"]))
    report = ila.convert(model)
    assert report.attentions == (ATTENTION, ATTENTION.replace("0", "1"))
    assert "2 attention blocks" in str(report)
    explained = ila.explain(model)
    assert explained.together == dict.fromkeys(report.attentions, ("q_proj", "v_proj"))
    assert "One op for each x: q_proj, v_proj in 2 blocks" in explained.table().caption
    assert ila.restore(model).attentions == report.attentions
    assert {type(model.get_submodule(name)) for name in report.attentions} == {LlamaAttention}


def test_merge_and_unload_leaves_transformers_own_classes(tiny):
    merged = tiny.attached(tiny.config(**ALL), tiny.base("qwen3")).merge_and_unload()
    assert not swapped(merged, Swapped)
    assert type(merged.model.layers[0].self_attn) is Qwen3Attention


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_with_its_own_layers(tiny, way, groups):
    model = tiny.attached(tiny.config(**ALL), tiny.base("qwen3"))
    expected = tiny.run(model, input_ids=tiny.tokens(ROWS))
    twin = way(model)
    assert {m.plain_class for m in swapped(twin, FusedQkv).values()} == {Qwen3Attention}
    assert type(twin.get_submodule(ATTENTION)) is type(model.get_submodule(ATTENTION))
    for parameter in model.parameters():
        parameter.data.zero_()
    groups.clear()
    tiny.assert_equal(tiny.run(twin, input_ids=tiny.tokens(ROWS)), expected)
    assert len(groups) == 4


def test_blocks_of_other_kinds_are_left_with_the_reason(tiny):
    replaced = tiny.plain(tiny.config())
    block = replaced.get_submodule(ATTENTION)
    block.forward = block.forward
    report = ila.convert(replaced)
    assert "forward was replaced" in report.left[ATTENTION]
    assert len(report.attentions) == 1


def test_attention_weights_are_still_recorded(tiny):
    base = tiny.base()
    base.set_attn_implementation("eager")
    model = tiny.attached(tiny.config(**ALL), base)
    assert list(swapped(model, FusedQkv)) == [ATTENTION, ATTENTION.replace("0", "1")]
    attentions = model(input_ids=tiny.tokens(ROWS), output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(ROWS, 4, 7, 7)] * 2


# --- nothing of a forward outlives it


@pytest.mark.parametrize(
    "way", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_a_copy_made_in_the_middle_of_a_forward_holds_nothing_of_it(pair_of_layers, way):
    gate, up = pair_of_layers
    x = torch.randn(90, 32, dtype=FP64)
    with torch.no_grad():
        gate(x)
        twin = way(up)
        assert twin._shared_input is None and up._shared_input is not None
        assert torch.equal(twin(x), up(x.clone()))


@pytest.mark.parametrize("family", THREE)
def test_a_copy_of_a_model_made_by_a_hook_holds_nothing(tiny, family):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    expected = tiny.run(model, input_ids=tiny.tokens(ROWS))
    copies = []
    norm = model.get_submodule(LAYER).self_attn.o_proj
    handle = norm.register_forward_pre_hook(lambda *a: copies.append(copy.deepcopy(model)))
    model(input_ids=tiny.tokens(ROWS))
    handle.remove()
    (twin,) = copies
    assert no_traces(twin) and no_traces(model)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    tiny.assert_equal(tiny.run(twin, input_ids=tiny.tokens(ROWS)), expected)


@pytest.mark.parametrize("where", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])
@pytest.mark.parametrize("family", THREE)
def test_an_exception_in_the_middle_of_a_block_leaves_nothing(tiny, family, where):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    expected = tiny.run(model, input_ids=tiny.tokens(ROWS))

    def broken(module, args, output):
        raise MemoryError

    layers = [m for n, m in model.named_modules() if n.endswith(where)]
    handle = layers[0].register_forward_hook(broken)
    with pytest.raises(MemoryError):
        model(input_ids=tiny.tokens(ROWS))
    handle.remove()
    assert no_traces(model)
    tiny.assert_equal(tiny.run(model, input_ids=tiny.tokens(ROWS)), expected)


@pytest.mark.parametrize("first", [False, True])
def test_another_grad_mode_computes_anew(pair_of_layers, first):
    gate, up = pair_of_layers
    x = torch.randn(90, 32, dtype=FP64, requires_grad=True)
    with torch.set_grad_enabled(first):
        one = gate(x)
    with torch.set_grad_enabled(not first):
        other = up(x)
    assert (one.requires_grad, other.requires_grad) == (first, not first)
    (one if first else other).sum().backward()
    trained = gate if first else up
    assert trained.lora_A["default"].weight.grad is not None


def test_inference_mode_in_between_computes_anew(pair_of_layers):
    gate, up = pair_of_layers
    x = torch.randn(90, 32, dtype=FP64)
    gate(x)
    with torch.inference_mode():
        assert up(x).is_inference()


@pytest.mark.parametrize("dtypes", [(None, BF16), (BF16, None), (BF16, torch.float16)])
def test_another_autocast_computes_anew(tiny, dtypes):
    block = tiny.attached(tiny.config(**ALL), tiny.base(dtype=torch.float32)).get_submodule(MLP)
    x = torch.randn(90, 32)

    def under(layer, dtype):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return layer(x)

    with shared_input.sharing(block, ("gate_proj", "up_proj")):
        under(block.gate_proj, dtypes[0])
        y = under(block.up_proj, dtypes[1])
    assert y.dtype == (dtypes[1] or torch.float32)
    assert torch.equal(y, under(block.up_proj, dtypes[1]))

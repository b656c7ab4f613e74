"""The lean gated MLP: the plain block's bits, half of what it keeps, and always a way back."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import ila
from ila.models import shared_input
from ila.models.mlp import KEEPS_H, LEAN, PLAIN, lean_mlps, make_plain

BF16, FP64 = torch.bfloat16, torch.float64
MLP0 = "base_model.model.model.layers.0.mlp"
MLP1 = "base_model.model.model.layers.1.mlp"
ALL = {"target_modules": "all-linear"}
FAMILIES = ["llama", "mistral", "qwen3", "olmo2", "gemma2"]
THREE = ["llama", "qwen3", "gemma2"]


@pytest.fixture(autouse=True)
def gate_and_up_apart(monkeypatch):
    """As one op they round dx elsewhere; what is told apart here is what a block keeps."""
    monkeypatch.setattr(shared_input, "group_pays", lambda *arguments: False)


def plain_twin(model: nn.Module) -> nn.Module:
    """The same model and adapters with transformers' own forward of the block."""
    twin = copy.deepcopy(model)
    assert len(make_plain(twin)) == 2
    return twin


def assert_same_bits(tiny, model, rows=12, context=contextlib.nullcontext, **inputs) -> dict:
    """Logits and gradients of the lean model are its plain twin's; 84 tokens: no short path."""
    results = []
    for each in (plain_twin(model), model):
        torch.manual_seed(5)
        with context():
            results.append(tiny.run(each, input_ids=tiny.tokens(rows), **inputs))
    tiny.assert_equal(results[1], results[0])
    return results[1]


def down(model: nn.Module, name: str = MLP0) -> nn.Module:
    return model.get_submodule(f"{name}.down_proj")


def close(tiny, model, *kinds: str) -> None:
    ila.apply_mask(model, tiny.mask(model, lambda i, name: name.rpartition(".")[2] in kinds))


def routes(model: nn.Module) -> set[tuple[str, str]]:
    return set(ila.explain(model).mlps.values())


# --- the same bits


@pytest.mark.parametrize("dtype", [FP64, BF16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_bit_for_bit_the_plain_ones(pair, tiny, family, dtype):
    plain, ours = pair(tiny.config(**ALL), family=family, dtype=dtype)
    expected = [type(plain.get_submodule(name)) for name in (MLP0, MLP1)]
    assert [m.plain_class for m in lean_mlps(ours).values()] == expected
    assert routes(ours) == {(LEAN, "gate and up")}
    result = assert_same_bits(tiny, ours)
    assert len(result) == 1 + 2 * 14


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_plain_peft_gradients_agree_to_rounding(pair, tiny, family, rows):
    plain, ours = pair(tiny.config(**ALL), family=family)
    ids = tiny.tokens(rows)
    tiny.assert_close(tiny.run(ours, input_ids=ids), tiny.run(plain, input_ids=ids))


@pytest.mark.parametrize(
    "closed",
    [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["gate_proj", "up_proj", "down_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
    ],
)
@pytest.mark.parametrize("family", THREE)
def test_any_part_may_be_closed_and_open_again(tiny, family, closed):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    before = assert_same_bits(tiny, model)
    close(tiny, model, *closed)
    masked = assert_same_bits(tiny, model)
    assert tiny.differs(masked, before)
    close(tiny, model)
    tiny.assert_equal(assert_same_bits(tiny, model), before)


def test_dropout_draws_the_masks_that_the_plain_block_draws(tiny):
    model = tiny.attached(tiny.config(**ALL, lora_dropout=0.3)).train()
    trained = assert_same_bits(tiny, model)
    assert tiny.differs(trained, tiny.run(model.eval(), input_ids=tiny.tokens(12)))


def test_scores_get_the_same_gradients(tiny):
    model = tiny.attached(tiny.config(**ALL))
    model.requires_grad_(False)
    for layer in tiny.layers(model).values():
        layer.lora_S["default"] = nn.Parameter(torch.full((1,), 0.4, dtype=FP64))
    result = assert_same_bits(tiny, model)
    assert len(result) == 1 + 14


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", THREE)
def test_gradient_checkpointing(tiny, family, use_reentrant):
    model = tiny.attached(tiny.config(**ALL, lora_dropout=0.3), tiny.base(family)).train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert len(assert_same_bits(tiny, model)) == 1 + 2 * 14


@pytest.mark.parametrize("family", THREE)
def test_autocast(tiny, family):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family, dtype=torch.float32))
    autocast = assert_same_bits(tiny, model, context=lambda: torch.autocast("cpu", dtype=BF16))
    assert tiny.differs(autocast, tiny.run(model, input_ids=tiny.tokens(12)))


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_bases(tiny, tmp_path, autocast):
    pytest.importorskip("bitsandbytes")
    tiny.base(dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=BF16)
    options = {"quantization_config": how, "dtype": BF16, "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **options).train()
    model = tiny.attached(tiny.config(**ALL), base)
    assert routes(model) == {(LEAN, "gate and up")}
    context = (lambda: torch.autocast("cpu", dtype=BF16)) if autocast else contextlib.nullcontext
    assert len(assert_same_bits(tiny, model, context=context)) == 1 + 2 * 14


# --- where h is kept, or nothing is changed


def merge(tiny, model):
    model.merge_adapter()


def two_adapters(tiny, model):
    model.add_adapter("second", tiny.config(**ALL))
    model.base_model.set_adapter(["default", "second"])


def dora(tiny, model):
    model.add_adapter("second", tiny.config(target_modules=["down_proj"], use_dora=True))
    model.set_adapter("second")


def hook_that_changes_h(tiny, model):
    for name in (MLP0, MLP1):
        # In place: h itself changes, and what is recomputed would not.
        down(model, name).register_forward_pre_hook(lambda m, args: (args[0].add_(2),))


def hook_on_the_activation(tiny, model):
    for name in (MLP0, MLP1):
        act = copy.deepcopy(model.get_submodule(name).act_fn)
        act.register_forward_hook(lambda m, args, out: out + 2)
        model.get_submodule(name).act_fn = act


def another_activation(tiny, model):
    for name in (MLP0, MLP1):
        model.get_submodule(name).act_fn = nn.Hardswish()


@pytest.mark.parametrize(
    ("change", "path", "why"),
    [
        (merge, KEEPS_H, "an adapter is merged"),
        (two_adapters, KEEPS_H, "several adapters are active"),
        (dora, KEEPS_H, "LoRA variant Dora"),
        (hook_that_changes_h, KEEPS_H, "down_proj has hooks"),
        (hook_on_the_activation, PLAIN, "its act_fn has hooks"),
        (another_activation, PLAIN, "its act_fn is Hardswish, neither"),
    ],
)
@pytest.mark.parametrize("family", THREE)
def test_what_needs_the_plain_way_takes_it_and_is_told(tiny, family, change, path, why):
    model = tiny.attached(tiny.config(**ALL), tiny.base(family))
    before = tiny.run(model, input_ids=tiny.tokens(12))
    change(tiny, model)
    ((found, reason),) = routes(model)
    assert found == path
    assert why in reason
    assert f"2 {path}" in ila.explain(model).table().caption
    after = assert_same_bits(tiny, model)
    assert change is merge or tiny.differs(after, before)


def test_disabled_adapters(tiny):
    model = tiny.attached(tiny.config(**ALL))
    with model.disable_adapter():
        ((path, reason),) = routes(model)
        assert (path, "disabled" in reason) == (KEEPS_H, True)
        assert torch.equal(model(tiny.tokens()).logits, tiny.base()(tiny.tokens()).logits)
    assert routes(model) == {(LEAN, "gate and up")}


def test_a_batch_of_several_adapters(tiny):
    model = tiny.attached(tiny.config(**ALL)).eval()
    model.add_adapter("second", tiny.config(**ALL))
    names = ["default", "second", "__base__"] * 4
    ids = tiny.tokens(12)
    with torch.no_grad():
        mine, theirs = (
            each(input_ids=ids, adapter_names=names).logits for each in (model, plain_twin(model))
        )
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, model(input_ids=ids).logits)


# --- what is kept


def widths_kept(model: nn.Module, name: str, x: torch.Tensor) -> int:
    """How many tensors of M·F elements the graph of one block keeps."""
    block = model.get_submodule(name)
    kept = {}

    def pack(tensor):
        if tensor.shape[-1] == 48 and tensor.numel() == x.shape[0] * 48:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    y.sum().backward()
    return len(kept)


@pytest.mark.parametrize(
    ("closed", "plain", "lean"),
    [
        ([], 4, 2),
        (["down_proj"], 3, 2),
        (["gate_proj", "up_proj", "down_proj"], 3, 2),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", THREE)
def test_a_block_keeps_gate_and_up_only(tiny, family, closed, plain, lean, dropout):
    model = tiny.attached(tiny.config(**ALL, lora_dropout=dropout), tiny.base(family)).train()
    close(tiny, model, *closed)
    x = torch.randn(90, 32, dtype=FP64, requires_grad=True)
    assert widths_kept(model, MLP0, x) == lean
    assert widths_kept(plain_twin(model), MLP0, x) == plain


def test_the_search_keeps_no_h_either(tiny):
    model = tiny.attached(tiny.config(**ALL)).requires_grad_(False)
    down(model).lora_S["default"] = nn.Parameter(torch.ones(1, dtype=FP64))
    x = torch.randn(90, 32, dtype=FP64, requires_grad=True)
    assert widths_kept(model, MLP0, x) == 2


def test_below_the_lowest_open_layer_nothing_is_kept_but_h(tiny):
    model = tiny.attached(tiny.config(**ALL))
    x = torch.randn(90, 32, dtype=FP64)
    close(tiny, model, "gate_proj", "up_proj")
    assert widths_kept(model, MLP0, x) == 1  # h for dA: pre and up would be two
    assert_same_bits(tiny, model)


# --- which blocks, and the way back


def test_report_names_the_blocks_and_restore_undoes_them(tiny):
    model = tiny.plain(tiny.config(target_modules=["q_proj"]))
    report = ila.convert(model)
    assert report.mlps == (MLP0, MLP1)
    assert "2 gated MLPs" in str(report)
    assert len(report.swapped) == 2
    assert ila.restore(model).mlps == report.mlps
    assert {type(model.get_submodule(name)) for name in report.mlps} == {LlamaMLP}
    assert not lean_mlps(model)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_lean_too(tiny, way):
    model = tiny.attached(tiny.config(**ALL), tiny.base("qwen3"))
    twin = way(model)
    assert list(lean_mlps(twin)) == [MLP0, MLP1]
    assert type(twin.get_submodule(MLP0)) is type(model.get_submodule(MLP0))
    tiny.assert_equal(tiny.run(twin), tiny.run(model))
    ila.restore(twin)
    assert type(twin.get_submodule(MLP0)) is Qwen3MLP
    assert list(lean_mlps(model)) == [MLP0, MLP1]


def test_blocks_of_other_kinds_are_left_with_the_reason(tiny):
    for act, kind in (("relu2", "ReLUSquaredActivation"), ("gelu_python", "GELUActivation")):
        other = tiny.plain(tiny.config(), tiny.base(hidden_act=act))
        report = ila.convert(other)
        assert f"its act_fn is {kind}, neither" in report.left[MLP0] and report.mlps == ()
        said = [line for line in str(report).splitlines() if kind in line]
        assert len(said) == 1 and "and 1 more" in said[0]

    replaced = tiny.plain(tiny.config())
    block = replaced.get_submodule(MLP0)
    block.forward = block.forward
    report = ila.convert(replaced)
    assert "forward was replaced" in report.left[MLP0]
    assert report.mlps == (MLP1,)


def test_a_class_put_in_the_place_of_transformers_is_left(tiny):
    """What Liger does to a model: a forward bound to each block, and the class replaced."""

    class LigerSwiGLUMLP(LlamaMLP):
        def forward(self, x):
            return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))

    model = tiny.plain(tiny.config())
    model.get_submodule(MLP0).__class__ = LigerSwiGLUMLP
    report = ila.convert(model)
    assert "LigerSwiGLUMLP.forward is not down_proj(" in report.left[MLP0]
    assert report.mlps == (MLP1,)
    assert len(tiny.run(model)) > 1


def test_a_forward_bound_later_is_told(tiny):
    model = tiny.attached(tiny.config(**ALL))
    block = model.get_submodule(MLP0)
    block.forward = LlamaMLP.forward.__get__(block)
    assert ila.explain(model).mlps[MLP0] == (PLAIN, "its forward was replaced")
    assert ila.explain(model).mlps[MLP1] == (LEAN, "gate and up")
    tiny.run(model)

"""attach, convert, restore, apply_mask, explain: what they change; an error changes nothing."""

import copy
import itertools
import pkgutil

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora.layer import Embedding, Linear
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import ila

BLOCK0 = "base_model.model.model.layers.0"
DELETED = "ignore:Adapter .* was active which is now deleted"
FAN_IN = "ignore:fan_in_fan_out is set to"
Q0 = f"{BLOCK0}.self_attn.q_proj"


def close_some(position: int, name: str) -> bool:
    return position % 3 != 1


def close_none(position: int, name: str) -> bool:
    return False


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def peft_types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


class Mixed(nn.Module):
    """One layer of each kind that PEFT wraps, ours or not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.conv1d = Conv1D(8, 8)
        self.dispatched = nn.Linear(8, 8)
        self.linear = nn.Linear(8, 8)
        self.subclass = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)

    def forward(self, ids):
        return self.subclass(self.linear(self.dispatched(self.conv1d(self.embedding(ids)))))


def mixed(*targets: str) -> nn.Module:
    config = LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False)
    return inject_adapter_in_model(config, Mixed())


# --- attach


def test_attach_does_not_change_the_configuration_it_is_given(tiny):
    config = tiny.config(rank_pattern={"q_proj": 2})
    before = copy.deepcopy(config)
    first = tiny.attached(config)
    tiny.attached(config)
    ila.apply_mask(first, tiny.mask(first, close_some))
    assert config == before
    assert vars(config) == vars(before)


def test_attach_wraps_every_plain_linear_that_matches(tiny):
    model = tiny.attached(tiny.config(target_modules="all-linear"), adapter_name="mine")
    assert isinstance(model, PeftModel)
    assert len(tiny.layers(model)) == 14
    assert list(model.peft_config) == ["mine"]
    assert all(list(layer.lora_A) == ["mine"] for layer in tiny.layers(model).values())


def test_attach_leaves_what_is_no_linear_to_peft(tiny):
    model = tiny.attached(tiny.config(target_modules=["embed_tokens", "q_proj"]))
    plain = tiny.plain(tiny.config(target_modules=["embed_tokens", "q_proj"]))
    tiny.assert_close(tiny.run(model), tiny.run(plain))
    assert type(model.get_submodule("base_model.model.model.embed_tokens")) is Embedding
    assert len(tiny.layers(model)) == 2


def test_attach_takes_base_models_only(tiny):
    model = tiny.plain(tiny.config())
    before = tiny.snapshot(model)
    with pytest.raises(TypeError, match=r"got a PeftModel; use ila\.convert"):
        ila.attach(model, tiny.config())
    assert tiny.snapshot(model) == before
    with pytest.raises(TypeError, match="must be a LoraConfig, got dict"):
        ila.attach(tiny.base(), {"r": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"target_modules": ["embed_tokens"]}, "at least one plain nn.Linear.* became Embedding"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "excluded"),
        # The first block's q_proj is wrapped before PEFT meets the norm that it cannot wrap.
        ({"target_modules": ["q_proj", "input_layernorm"]}, "RMSNorm.* is not supported"),
        (
            {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
            "at least one plain nn.Linear",
        ),
        ({"use_dora": True, "arrow_config": object()}, "variant combination"),
        ({"r": 0}, "positive integer"),
    ],
    ids=["no match", "embedding only", "all excluded", "half way", "saved module", "variant", "r"],
)
def test_attach_that_fails_leaves_the_model_as_it_was(tiny, changes, message):
    base = tiny.base()
    base.model.norm.weight.requires_grad_(False)
    before = tiny.snapshot(base)
    config = tiny.config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        ila.attach(base, config)
    assert tiny.snapshot(base) == before
    expected = tiny.run(tiny.attached(tiny.config()))
    tiny.assert_equal(tiny.run(tiny.attached(tiny.config(), base)), expected)


# --- convert


@pytest.mark.filterwarnings(FAN_IN)
def test_convert_reports_what_it_swapped_and_why_it_left_the_rest():
    model = mixed("embedding", "conv1d", "dispatched", "linear", "subclass")
    model.dispatched.forward = model.dispatched.forward
    report = ila.convert(model)
    assert report.swapped == ("linear",)
    assert dict(report.left) == {
        "embedding": "PEFT handles this kind of layer itself (Embedding)",
        "conv1d": "its base layer is a Conv1D, not a plain nn.Linear",
        "dispatched": "its forward was replaced on the instance (a dispatch hook?)",
        "subclass": "its base layer is a NonDynamicallyQuantizableLinear, not a plain nn.Linear",
    }
    assert str(report).splitlines()[0] == "1 layers swapped, 4 left"
    assert len(str(report).splitlines()) == 5
    ids = torch.arange(5)
    assert torch.isfinite(model(ids)).all()


def test_convert_again_swaps_only_what_came_later(tiny):
    model = tiny.attached(tiny.config(target_modules=["q_proj"]))
    model.add_adapter("second", tiny.config(target_modules=["q_proj", "v_proj"]))
    report = ila.convert(model)
    assert [name.split(".")[-1] for name in report.swapped] == ["v_proj", "v_proj"]
    assert set(report.left.values()) == {"already converted"}
    with pytest.raises(ValueError, match="already converted"):
        ila.convert(model)


@pytest.mark.filterwarnings(FAN_IN)
@pytest.mark.parametrize("what", ["no LoRA", "embedding", "converted"])
def test_convert_that_swaps_nothing_is_an_error_and_changes_nothing(tiny, what):
    if what == "no LoRA":
        model, message = tiny.base(), "it has no LoRA layers"
    elif what == "embedding":
        model = mixed("embedding", "conv1d")
        message = "PEFT handles this kind of layer itself .*its base layer is a Conv1D"
    else:
        model, message = tiny.converted(tiny.config()), "already converted"
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        ila.convert(model)
    assert tiny.snapshot(model) == before


def test_convert_keeps_parameters_and_so_the_optimizer(tiny):
    def train(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            loss = model(tiny.tokens(), labels=tiny.tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    results = []
    for convert in (False, True):
        model = tiny.plain(tiny.config())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, 2)
        before = {name: id(p) for name, p in model.named_parameters()}
        if convert:
            ila.convert(model)
        assert {name: id(p) for name, p in model.named_parameters()} == before
        results.append(train(model, optimizer, 3))
    assert results[1] == pytest.approx(results[0], rel=1e-9)
    assert results[0][2] < results[0][0]


# --- restore


@pytest.mark.filterwarnings(DELETED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["", "DoRA"])
def test_restore_gives_back_what_peft_would_have_made(pair, tiny, changes, masked):
    plain, ours = pair(tiny.config(**changes, target_modules="all-linear"))
    expected = tiny.run(plain)
    if masked:
        ila.apply_mask(ours, tiny.mask(ours, close_some))
    report = ila.restore(ours)
    assert len(report.swapped) == 14
    assert peft_types(ours) == peft_types(plain)
    assert {n: set(vars(m)) for n, m in ours.named_modules()} == {
        n: set(vars(m)) for n, m in plain.named_modules()
    }
    tiny.assert_equal(tiny.state_of(ours), tiny.state_of(plain))
    assert ours.peft_config["default"].to_dict() == plain.peft_config["default"].to_dict()
    tiny.assert_equal(tiny.run(ours), expected)
    assert repr(ours) == repr(plain)
    # PEFT goes on as if nothing had been: these read the names of a layer's parts.
    for model in (plain, ours):
        model.add_adapter("second", tiny.config())
        model.set_adapter("second")
        model.delete_adapter("default")
    assert set(tiny.state_of(ours)) == set(tiny.state_of(plain))


def test_restore_and_convert_can_follow_one_another(tiny):
    model = tiny.attached(tiny.config())
    expected = tiny.run(model)
    for _ in range(2):
        assert ila.restore(model).swapped == ila.convert(model).swapped
    tiny.assert_equal(tiny.run(model), expected)


def test_restore_of_nothing_is_an_error(tiny):
    model = tiny.plain(tiny.config())
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match="no MaskedLoraLinear layer to restore"):
        ila.restore(model)
    assert tiny.snapshot(model) == before


# --- a closed layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_closed_layer_is_the_base_layer_bit_for_bit(tiny, dtype, bias):
    model = tiny.attached(tiny.config(), tiny.base(dtype=dtype, attention_bias=bias))
    reference = tiny.base(dtype=dtype, attention_bias=bias)
    ila.apply_mask(model, tiny.mask(model, lambda i, name: name == Q0))
    layer, linear = model.get_submodule(Q0), reference.model.layers[0].self_attn.q_proj
    assert type(linear) is nn.Linear
    assert (linear.bias is not None) == bias
    for shape in ((32,), (1, 32), (2, 37, 32), (0, 32)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(layer(x), linear(x))
    x = torch.randn(5, 32).to(dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((layer, linear), leaves, strict=True):
        module(leaf).square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_model_with_all_but_one_layer_closed_is_almost_the_base_model(tiny):
    model = tiny.attached(tiny.config())
    last = list(tiny.layers(model))[-1]
    ila.apply_mask(model, tiny.mask(model, lambda i, name: name != last))
    layer = model.get_submodule(last)
    assert layer.lora_A["default"].weight.requires_grad
    layer.set_scale("default", 0.0)
    assert torch.equal(model(tiny.tokens()).logits, tiny.base()(tiny.tokens()).logits)


def test_closed_layer_saves_nothing_for_backward(tiny):
    model = tiny.attached(tiny.config())
    layer = model.get_submodule(Q0)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)

    def saved(call):
        pointers = []

        def pack(tensor):
            pointers.append(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = call(x)
        return y, pointers

    _, when_open = saved(layer)
    assert x.data_ptr() in when_open
    ila.apply_mask(model, tiny.mask(model, lambda i, name: name == Q0))
    y, when_closed = saved(layer)
    _, of_linear = saved(lambda x: F.linear(x, layer.base_layer.weight))
    assert when_closed == of_linear == [layer.base_layer.weight.data_ptr()]
    assert type(y.grad_fn).__name__ == type(F.linear(x, layer.weight).grad_fn).__name__


def test_closed_layers_have_no_parameters_and_no_gradients(tiny):
    model = tiny.attached(tiny.config())
    tiny.run(model)  # leaves gradients behind
    held = {
        name: [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
        for name, layer in tiny.layers(model).items()
    }
    mask = tiny.mask(model, close_some)
    report = ila.apply_mask(model, mask)
    assert (report.adapter, report.open, report.closed) == ("default", mask.open, mask.closed)
    assert str(report) == f"adapter 'default': {len(mask.open)} of 12 layers open"
    registered = {id(p) for p in model.parameters()}
    for name, parameters in held.items():
        for parameter in parameters:
            assert (id(parameter) in registered) == (name in mask.open)
            assert (parameter.grad is None) == (name in mask.closed)
    tiny.run(model)
    assert all(p.grad is None for name in mask.closed for p in held[name])
    assert all(p.grad is not None for name in mask.open for p in held[name])
    assert len(lora_parameters(model)) == 2 * len(mask.open)
    adapters = [key for key in model.state_dict() if ".lora_" in key]
    assert {key.partition(".lora_")[0] for key in adapters} == set(mask.open)


def test_masked_model_is_peft_with_fewer_targets(pair, tiny):
    _, ours = pair()
    mask = tiny.mask(ours, close_some)
    ila.apply_mask(ours, mask)
    targets = [name.removeprefix("base_model.model.") for name in mask.open]
    smaller = tiny.plain(tiny.config(target_modules=targets))
    smaller.load_state_dict(ours.state_dict(), strict=False)
    assert set(lora_parameters(smaller)) == set(lora_parameters(ours))
    tiny.assert_close(rename(tiny.run(ours)), rename(tiny.run(smaller)))
    assert ours.peft_config["default"].target_modules == set(targets)


def rename(result):
    return {name.replace(".base_layer", ""): tensor for name, tensor in result.items()}


def test_merging_a_masked_model_merges_the_open_layers_only(tiny):
    model = tiny.attached(tiny.config())
    mask = tiny.mask(model, close_some)
    ila.apply_mask(model, mask)
    expected = tiny.run(model)["logits"]
    base = tiny.state_of(tiny.base())
    merged = model.merge_and_unload()
    assert torch.allclose(merged(tiny.tokens()).logits, expected, rtol=0, atol=1e-11)
    changed = {name for name, tensor in merged.state_dict().items() if not tensor.equal(base[name])}
    prefix = "base_model.model."
    assert changed == {f"{name.removeprefix(prefix)}.weight" for name in mask.open}


def test_closed_layers_join_a_mixed_batch_as_base_layers(tiny):
    model = tiny.attached(tiny.config()).eval()
    ila.apply_mask(model, tiny.mask(model, close_some))
    expected = tiny.run(model)["logits"]
    names = ["default", "__base__", "default"]
    mixed_batch = tiny.run(model, adapter_names=names)["logits"]
    base = tiny.base()(tiny.tokens()).logits
    assert torch.allclose(mixed_batch[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-11)
    assert torch.allclose(mixed_batch[1], base[1], rtol=0, atol=1e-11)


# --- opening again


def test_reopening_gives_back_parameters_flags_and_configuration(pair, tiny):
    _, ours = pair(tiny.config(lora_dropout=0.1, target_modules="all-linear"))
    layer = ours.get_submodule(Q0)
    layer.lora_A["default"].weight.requires_grad_(False)
    before, config = tiny.snapshot(ours), copy.deepcopy(ours.peft_config["default"])
    ila.apply_mask(ours, tiny.mask(ours, lambda i, name: name == Q0))
    assert not lora_parameters(layer)
    ila.apply_mask(ours, tiny.mask(ours, close_none))
    after = tiny.snapshot(ours)
    assert after[1] == before[1]  # identities, flags and bits
    assert sorted(after[0]) == sorted(before[0])
    assert ours.peft_config["default"].to_dict() == config.to_dict()
    assert not layer.lora_A["default"].weight.requires_grad


def test_reopening_does_not_round_fp32_adapters_over_a_half_precision_base(tiny):
    model = tiny.attached(tiny.config(), tiny.base(dtype=torch.bfloat16))
    before = {n: (id(p), p.detach().clone()) for n, p in lora_parameters(model).items()}
    ila.apply_mask(model, tiny.mask(model, close_some))
    ila.apply_mask(model, tiny.mask(model, close_none))
    after = lora_parameters(model)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], value)


def test_reopened_layer_follows_training_mode(tiny):
    model = tiny.attached(tiny.config(lora_dropout=0.5)).train()
    ila.apply_mask(model, tiny.mask(model, close_some))
    model.eval()
    ila.apply_mask(model, tiny.mask(model, close_none))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("first", ["default", "second"])
def test_reopened_layer_requires_grad_if_its_adapter_is_active_now(tiny, first):
    other = {"default": "second", "second": "default"}[first]
    model = tiny.attached(tiny.config())
    model.add_adapter("second", tiny.config())
    model.set_adapter(first)
    ila.apply_mask(model, tiny.mask(model, close_some), adapter_name="default")
    model.set_adapter(other)
    ila.apply_mask(model, tiny.mask(model, close_none), adapter_name="default")
    for name, parameter in lora_parameters(model).items():
        assert parameter.requires_grad == (f".{other}." in name), name


def test_model_moved_while_layers_are_closed_can_be_opened(tiny):
    model = tiny.attached(tiny.config())
    mask = tiny.mask(model, close_some)
    expected = tiny.run(model)["logits"]
    ila.apply_mask(model, mask)
    model.to(torch.float32)
    half = copy.deepcopy(model)
    ila.apply_mask(model, tiny.mask(model, close_none))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    logits = model(tiny.tokens()).logits
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), expected, rtol=1e-4, atol=1e-4)

    half.to("meta")
    assert {p.device.type for p in half.parameters()} == {"meta"}
    x = torch.empty(5, 32, device="meta")
    assert all(half.get_submodule(n)(x).shape == (5, 32) for n in mask.scores if "q_proj" in n)
    ila.apply_mask(half, tiny.mask(half, close_none))
    # The weights that were set aside are all that is left; meta would lose them too.
    closed = [half.get_submodule(name) for name in mask.closed]
    assert {p.device.type for layer in closed for p in layer.lora_A.parameters()} == {"cpu"}


# --- optimizers


def test_optimizer_forgets_closed_layers(tiny):
    model = tiny.attached(tiny.config())
    groups = [
        {"params": [p for n, p in lora_parameters(model).items() if ".lora_A." in n], "lr": 1e-3},
        {"params": [p for n, p in lora_parameters(model).items() if ".lora_B." in n], "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups)
    tiny.run(model)
    optimizer.step()
    assert len(optimizer.state) == 24
    mask = tiny.mask(model, close_some)
    closed = [p for n, p in lora_parameters(model).items() if any(c in n for c in mask.closed)]
    weights = [p.detach().clone() for p in closed]
    ila.apply_mask(model, mask, optimizer=optimizer)
    left = list(lora_parameters(model).values())
    assert {id(p) for p in optimizer.state} == {id(p) for p in left}
    held = list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
    assert {id(p) for p in held} == {id(p) for p in left}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    tiny.run(model)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(p, w) for p, w in zip(closed, weights, strict=True))


def test_opening_with_an_optimizer_is_an_error_that_changes_nothing(tiny):
    model = tiny.attached(tiny.config())
    names = list(tiny.layers(model))
    ila.apply_mask(model, tiny.mask(model, lambda i, name: i == 0))
    optimizer = torch.optim.AdamW(model.parameters())
    tiny.run(model)
    optimizer.step()
    before, state = tiny.snapshot(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="does not hold the parameters of 1 layers"):
        ila.apply_mask(model, tiny.mask(model, lambda i, name: i == 1), optimizer=optimizer)
    assert tiny.snapshot(model) == before
    assert str(optimizer.state_dict()) == str(state)
    assert model.get_submodule(names[0]).is_closed("default")


# --- what apply_mask refuses


def other_mask(tiny, model, kind):
    names = list(tiny.layers(model))
    scores = dict.fromkeys(names, 1.0)
    if kind == "missing":
        del scores[names[0]]
    elif kind == "unknown":
        scores["base_model.model.model.layers.7.self_attn.q_proj"] = 1.0
    else:
        scores = {name.removeprefix("base_model.model."): 1.0 for name in names}
    return ila.LayerMask(scores, {name: i > 2 for i, name in enumerate(scores)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "0 of its names are unknown here and 1 are missing"),
        ("unknown", "1 of its names are unknown here and 0 are missing"),
        ("names of the base model", "12 of its names are unknown here and 12 are missing"),
    ],
)
def test_mask_of_another_model_is_an_error_that_changes_nothing(tiny, kind, message):
    model = tiny.attached(tiny.config())
    ila.apply_mask(model, tiny.mask(model, close_some))
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        ila.apply_mask(model, other_mask(tiny, model, kind))
    assert tiny.snapshot(model) == before


def test_mask_needs_a_model_of_ours(tiny):
    model = tiny.plain(tiny.config())
    mask = tiny.mask(tiny.attached(tiny.config()), close_some)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"use ila\.attach or ila\.convert first"):
        ila.apply_mask(model, mask)
    with pytest.raises(TypeError, match="must be a PeftModel, got LlamaForCausalLM"):
        ila.apply_mask(tiny.base(), mask)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_adapter_cannot_be_masked(tiny, safe_merge):
    model = tiny.attached(tiny.config())
    model.merge_adapter(safe_merge=safe_merge)
    before = tiny.snapshot(model)
    with pytest.raises(RuntimeError, match="is merged; unmerge it"):
        ila.apply_mask(model, tiny.mask(model, close_some))
    assert tiny.snapshot(model) == before
    with pytest.raises(RuntimeError, match="is merged; unmerge it"):
        model.get_submodule(Q0).close("default")
    assert tiny.snapshot(model) == before


def test_one_of_several_active_adapters_must_be_named(tiny):
    model = tiny.attached(tiny.config())
    model.add_adapter("second", tiny.config())
    model.base_model.set_adapter(["default", "second"])
    mask, before = tiny.mask(model, close_some), tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"active adapters are \['default', 'second'\]"):
        ila.apply_mask(model, mask)
    with pytest.raises(ValueError, match=r"must be one of \['default', 'second'\], got 'third'"):
        ila.apply_mask(model, mask, adapter_name="third")
    assert tiny.snapshot(model) == before
    assert ila.apply_mask(model, mask, adapter_name="second").adapter == "second"


UNCLOSABLE = {
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}
if hasattr(lora, "KasaConfig"):  # of PEFT 0.21 and newer
    UNCLOSABLE["KaSA"] = {"kasa_config": lora.KasaConfig()}


@pytest.mark.parametrize("kind", UNCLOSABLE)
def test_adapter_that_changes_its_base_cannot_be_closed(tiny, kind):
    # Without the adapter such a layer is not the pretrained one, and plain PEFT reloads it as such.
    base = tiny.base(dtype=torch.float32, attention_bias=True)
    model = tiny.attached(tiny.config(**UNCLOSABLE[kind]), base)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"(bias|init_lora_weights|kasa_config).* to close layers"):
        ila.apply_mask(model, tiny.mask(model, close_some))
    assert tiny.snapshot(model) == before
    ila.apply_mask(model, tiny.mask(model, close_none))
    assert tiny.snapshot(model) == before


# --- one mask after another, several adapters


def test_same_mask_twice_is_that_mask(tiny):
    model = tiny.attached(tiny.config())
    mask = tiny.mask(model, close_some)
    first = ila.apply_mask(model, mask)
    before = tiny.snapshot(model)
    assert ila.apply_mask(model, mask) == first
    assert tiny.snapshot(model) == before


def test_last_mask_wins(tiny):
    straight, through = tiny.attached(tiny.config()), tiny.attached(tiny.config())
    for closed in (close_some, lambda i, name: i < 7, lambda i, name: i % 2 == 0):
        ila.apply_mask(through, tiny.mask(through, closed))
    ila.apply_mask(straight, tiny.mask(straight, closed))
    tiny.assert_equal(tiny.state_of(through), tiny.state_of(straight))
    tiny.assert_equal(tiny.run(through), tiny.run(straight))
    targets = [m.peft_config["default"].target_modules for m in (through, straight)]
    assert targets[0] == targets[1]


def two_adapters(tiny):
    model = tiny.attached(tiny.config())
    torch.manual_seed(6)
    model.add_adapter("second", tiny.config(r=3))
    return model


def test_closing_one_adapter_leaves_the_other_untouched(tiny):
    model = two_adapters(tiny)
    model.set_adapter("second")
    expected = tiny.run(model)
    state = {n: v for n, v in tiny.state_of(model).items() if ".default." not in n}
    targets = set(model.peft_config["second"].target_modules)
    ila.apply_mask(model, tiny.mask(model, close_some), adapter_name="default")
    tiny.assert_equal(tiny.run(model), expected)
    after = tiny.state_of(model)
    tiny.assert_equal({n: v for n, v in after.items() if ".default." not in n}, state)
    assert model.peft_config["second"].target_modules == targets
    assert ila.explain(model).paths() == {"eager": 12}
    model.set_adapter("default")
    assert ila.explain(model).paths() == {"eager": 4, "bare": 8}


def test_two_active_adapters_of_which_one_is_closed_are_one(tiny):
    model = two_adapters(tiny)
    ila.apply_mask(model, tiny.mask(model, lambda i, name: i > 0), adapter_name="second")
    model.base_model.set_adapter(["default", "second"])
    assert ila.explain(model).paths() == {"peft": 1, "eager": 11}
    reference = two_adapters(tiny)
    reference.base_model.set_adapter(["default", "second"])
    for layer in list(tiny.layers(reference).values())[1:]:
        layer.set_scale("second", 0.0)
    ours, theirs = tiny.run(model), tiny.run(reference)
    tiny.assert_close(ours, {name: theirs[name] for name in ours}, 1e-10)


@pytest.mark.filterwarnings(DELETED)
@pytest.mark.parametrize("closed", [close_some, close_none], ids=["closed", "open"])
def test_deleted_adapter_is_gone_and_its_name_is_free(tiny, closed):
    model = two_adapters(tiny)
    ila.apply_mask(model, tiny.mask(model, closed))
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert {tuple(layer.active_adapters) for layer in tiny.layers(model).values()} == {("second",)}
    assert not any(layer.is_closed("default") for layer in tiny.layers(model).values())
    assert not any(".default." in name for name in model.state_dict())
    model.add_adapter("default", tiny.config(r=5))
    model.set_adapter("default")
    assert {layer.r["default"] for layer in tiny.layers(model).values()} == {5}
    assert ila.explain(model).paths() == {"eager": 12}


@pytest.mark.filterwarnings(DELETED)
def test_layers_agree_on_the_next_adapter_though_one_is_closed_in_some(tiny):
    model = two_adapters(tiny)
    model.add_adapter("last", tiny.config())
    ila.apply_mask(model, tiny.mask(model, close_some), adapter_name="default")
    model.set_adapter("last")
    model.delete_adapter("last")
    active = {tuple(layer.active_adapters) for layer in tiny.layers(model).values()}
    assert active == {tuple(model.active_adapters)}


# --- saving what a mask left


def test_saved_adapter_holds_the_open_layers_and_loads_in_plain_peft(tiny, tmp_path):
    model = tiny.attached(tiny.config(target_modules="all-linear", use_rslora=True))
    mask = tiny.mask(model, close_some)
    ila.apply_mask(model, mask)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    parts = ("lora_A.weight", "lora_B.weight")
    assert set(saved) == {f"{name}.{part}" for name in mask.open for part in parts}
    assert "ila" not in (tmp_path / "adapter_config.json").read_text()
    plain = PeftModel.from_pretrained(tiny.base(), tmp_path, is_trainable=True)
    expected = tiny.run(plain)
    tiny.assert_close(rename(tiny.run(model)), rename(expected))
    wrapped = {name for name, module in plain.named_modules() if type(module) is Linear}
    assert wrapped == set(mask.open)
    ila.convert(plain)
    assert ila.explain(plain).paths() == {"eager": len(mask.open)}
    tiny.assert_close(tiny.run(plain), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["embed_tokens", "q_proj", "up_proj"]},
        {"target_modules": ["lm_head", "v_proj"], "modules_to_save": ["embed_tokens"]},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\.mlp.*"},
        {"target_modules": r".*(q|down)_proj"},
        {
            "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.gate_proj": 5},
            "alpha_pattern": {"v_proj": 3},
        },
        {"use_dora": True},
    ],
    ids=["embedding", "head", "one block", "excluded", "expression", "patterns", "DoRA"],
)
# PEFT says so of a pattern all of whose layers are closed: nothing is lost by ignoring it.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_targets_name_the_open_layers_and_what_is_not_masked(tiny, tmp_path, changes):
    model = tiny.attached(tiny.config(**changes)).eval()
    mask = tiny.mask(model, close_some)
    ila.apply_mask(model, mask)
    targets = model.peft_config["default"].target_modules
    names = {f"base_model.model.{name}" for name in targets}
    # An embedding goes by its last name: PEFT looks for that where it saves the weight beside.
    assert names - set(mask.open) <= {"base_model.model.embed_tokens"}
    assert set(mask.open) <= names
    embeddings = "embed_tokens" in changes.get("target_modules", ())
    assert ("embed_tokens" in targets) == embeddings
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = PeftModel.from_pretrained(tiny.base(), tmp_path).eval()
    logits, expected = model(tiny.tokens()).logits, plain(tiny.tokens()).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-11)
    assert (expected - tiny.base()(tiny.tokens()).logits).abs().max() > 1e-3


def test_loading_under_a_closed_name_brings_the_whole_adapter_back(tiny, tmp_path):
    model = tiny.attached(tiny.config())
    expected = tiny.run(model)
    model.save_pretrained(tmp_path)
    ila.apply_mask(model, tiny.mask(model, close_some))
    model.load_adapter(tmp_path, "again", is_trainable=True)
    model.set_adapter("again")
    tiny.assert_equal(
        {n.replace(".again.", ".default."): t for n, t in tiny.run(model).items()}, expected
    )


# --- explain


def routes(tiny):
    """Name -> (model, path, part of the reason, open) for every route of a whole model."""
    config = tiny.config
    plain = tiny.attached(config())
    yield "fused", plain, "eager", "plain LoRA on nn.Linear; ", True
    model = tiny.attached(config(use_dora=True))
    yield "variant", model, "peft", "LoRA variant Dora", True
    model = tiny.attached(config(lora_bias=True), tiny.base(attention_bias=True, mlp_bias=True))
    yield "lora_bias", model, "peft", "lora_bias=True", True
    model = tiny.attached(config())
    model.base_model.disable_adapter_layers()
    yield "disabled", model, "peft", "adapters are disabled", True
    model = tiny.attached(config())
    model.merge_adapter()
    yield "merged", model, "peft", "an adapter is merged into the base weight", True
    model = two_adapters(tiny)
    model.base_model.set_adapter(["default", "second"])
    yield "several", model, "peft", "several adapters are active", True
    model = tiny.attached(config())
    model.base_model.set_adapter([])
    yield "none active", model, "bare", "no active adapter in this layer", False
    yield "not converted", tiny.plain(config()), "peft", "not converted (Linear)", True
    model = tiny.attached(config())
    for layer in tiny.layers(model).values():
        layer.base_layer.register_forward_hook(lambda *args: None)
    yield "hooks", model, "peft", "has hooks or a forward of its own", True
    model = tiny.attached(config())
    for layer in tiny.layers(model).values():
        layer.lora_B["default"] = nn.Sequential(layer.lora_B["default"])
    yield "adapter type", model, "peft", "an adapter module is not a plain nn.Linear", True
    model = tiny.attached(config(lora_dropout=1.0))
    yield "dropout of all", model, "peft", "an adapter module is not a plain nn.Linear", True
    model = tiny.attached(config())
    for layer in tiny.layers(model).values():
        nn.utils.parametrizations.orthogonal(layer.base_layer)
    yield "base type", model, "peft", "the base layer is not a plain nn.Linear", True


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_explain_names_path_and_reason_of_every_route(tiny):
    for name, model, path, why, is_open in routes(tiny):
        explanation = ila.explain(model)
        assert len(explanation) == 12, name
        assert explanation.paths() == {path: 12}, name
        assert all(why in row.why for row in explanation), (name, explanation.rows[0])
        assert {row.open for row in explanation} == {is_open}, name
        text = str(explanation)
        assert f"12 layers: 12 {path}" in text
        assert Q0 in text
        model(tiny.tokens())  # and the route runs


def test_explain_tells_closed_layers_from_layers_without_the_adapter(tiny):
    model = two_adapters(tiny)
    mask = tiny.mask(model, close_some)
    ila.apply_mask(model, mask)
    rows = {row.module: row for row in ila.explain(model)}
    assert {name for name, row in rows.items() if row.open} == set(mask.open)
    assert {rows[name].why for name in mask.closed} == {"closed by a mask"}
    assert {rows[name].path for name in mask.closed} == {"bare"}
    text = str(ila.explain(model))
    assert "12 layers: 8 bare, 4 eager" in text
    assert text.count("closed by a mask") == 8


def test_no_public_name_is_also_a_module():
    # Importing a submodule sets it on its package, over a function of that name.
    modules = {module.name for module in pkgutil.iter_modules(ila.__path__)}
    assert not modules & set(ila.__all__)
    assert ila.Explanation.__module__ == ila.explain.__module__ == "ila.models.explain"


def test_explain_of_a_model_without_lora_is_an_error(tiny):
    with pytest.raises(ValueError, match="no LoRA layer to explain"):
        ila.explain(tiny.base())

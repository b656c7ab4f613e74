"""What PEFT's helpers do to a layer after the fact works on ours as on PEFT's own."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, cast_mixed_precision_params, get_layer_status, get_model_status
from peft.helpers import (
    DoraCaching,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_signature,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora import LoraLayer, convert_to_lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import ila

ROWS = 12  # of 7 tokens: more than the 64 below which layers of one x stay apart on a CPU


def pair(tiny, **changes):
    config = tiny.config(**{"target_modules": "all-linear", **changes})
    return tiny.plain(config), tiny.attached(config)


def ids(tiny):
    return tiny.tokens(ROWS)


# --- scales


def hot_swappable(model):
    prepare_model_for_compiled_hotswap(model, target_rank=8)


def hot_swappable_and_scaled(model):
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)


def every(name, *args):
    def change(model):
        for module in model.modules():
            if hasattr(module, name):
                getattr(module, name)(*args)

    change.__name__ = f"{name} of {args}"
    return change


def as_tensors(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: torch.tensor([s]) for name, s in module.scaling.items()}


def signatures(model):
    update_signature(model)


@pytest.mark.parametrize(
    "change",
    [
        hot_swappable,
        hot_swappable_and_scaled,
        every("set_scale", "default", 0.3),
        every("scale_layer", 3),
        every("unscale_layer"),
        every("unscale_layer", 2),
        every("set_scale", "default", torch.tensor(0.3)),
        as_tensors,
        signatures,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scales_and_ranks_that_are_changed_later(tiny, change, use_rslora):
    found = []
    for model in pair(tiny, use_rslora=use_rslora):
        change(model)
        found.append(tiny.run(model, input_ids=ids(tiny)))
    tiny.assert_close(found[1], found[0])


def test_scales_inside_of_a_context(tiny):
    found = []
    for model in pair(tiny):
        outside = tiny.run(model, input_ids=ids(tiny))
        with rescale_adapter_scale(model, 0.25), disable_input_dtype_casting(model):
            found.append(tiny.run(model, input_ids=ids(tiny)))
        tiny.assert_equal(tiny.run(model, input_ids=ids(tiny)), outside)
        assert tiny.differs(found[-1], outside)
    tiny.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "change", [every("set_scale", "default", 0.3), every("scale_layer", 3), every("unscale_layer")]
)
def test_scales_reach_layers_that_are_closed(tiny, change):
    model, open_one = tiny.attached(tiny.config()), tiny.attached(tiny.config())
    half = tiny.mask(model, lambda at, name: at % 2 == 0)
    for each in (model, open_one):
        every("scale_layer", 1.5)(each)
    ila.apply_mask(model, half)
    before = tiny.snapshot(model)
    change(model)
    assert tiny.snapshot(model) == before
    change(open_one)
    ila.apply_mask(model, tiny.mask(model, lambda at, name: False))
    tiny.assert_equal(tiny.run(model), tiny.run(open_one))


# --- weights


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_swapped_in_place(tiny, tmp_path, compiled):
    found = []
    for number, model in enumerate(pair(tiny)):
        model.eval()
        torch.manual_seed(7)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        other.save_pretrained(tmp_path / str(number))
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        run = torch.compile(model, backend="eager") if compiled else model
        first = run(input_ids=ids(tiny)).logits
        hotswap_adapter(model, str(tmp_path / str(number)), adapter_name="default")
        second = run(input_ids=ids(tiny)).logits
        torch.testing.assert_close(second, other(input_ids=ids(tiny)).logits)
        found.append({"first": first.detach(), "second": second.detach()})
    tiny.assert_close(found[1], found[0])


def lora_fa(model):
    return create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)


def lora_plus(model):
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0)


def riemannian(model):
    module = pytest.importorskip("peft.optimizers.riemannian", reason="came with PEFT 0.21")
    return module.create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2)


@pytest.mark.parametrize("make", [lora_fa, lora_plus, riemannian])
@pytest.mark.parametrize("masked", [False, True])
def test_optimizers_of_peft(tiny, make, masked):
    found = []
    kinds = ["q_proj", "up_proj"]
    for at, model in enumerate(pair(tiny, target_modules=kinds)):
        if masked and at == 1:
            ila.apply_mask(model, tiny.mask(model, lambda at, name: "up_proj" in name))
        elif masked:
            model = tiny.plain(tiny.config(target_modules=kinds))
            for name, layer in list(model.named_modules()):
                if name.endswith("up_proj"):
                    parent = model.get_submodule(name.rpartition(".")[0])
                    parent.up_proj = layer.base_layer
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids(tiny)).logits.sin().sum().backward()
            optimizer.step()
        found.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
    tiny.assert_close(found[1], found[0], tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_is_cast_alike(tiny, dtype):
    found = []
    for model in pair(tiny):
        cast_mixed_precision_params(model, dtype)
        found.append({name: p.dtype for name, p in model.named_parameters()})
    assert found[0] == found[1]


def test_status_of_layers_and_model(tiny):
    plain, ours = pair(tiny)
    fields = ("name", "enabled", "active_adapters", "merged_adapters", "available_adapters")
    told = [
        [[getattr(layer, field) for field in fields] for layer in get_layer_status(model)]
        for model in (plain, ours)
    ]
    assert told[0] == told[1]
    assert get_model_status(plain).trainable_params == get_model_status(ours).trainable_params
    ila.apply_mask(ours, tiny.mask(ours, lambda at, name: at % 2 == 0))
    assert get_model_status(ours).enabled is True


def test_intruder_dimensions_are_reduced(tiny):
    found = []
    for model in pair(tiny):
        reduce_intruder_dimension(model, threshold_epsilon=0.9, logging_sink=None)
        found.append(tiny.run(model, input_ids=ids(tiny)))
    tiny.assert_close(found[1], found[0], tolerance=1e-8)


def test_an_adapter_is_converted_to_one_of_lower_rank(tiny):
    found = []
    for model in pair(tiny):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, state = convert_to_lora(model, rank=2)
        found.append({name: tensor.detach() for name, tensor in state.items()})
        assert config.r == 2
    products = [
        {
            n.replace(".lora_A", ""): s[n.replace("lora_A", "lora_B")] @ a
            for n, a in s.items()
            if "lora_A" in n
        }
        for s in found
    ]
    tiny.assert_close(products[1], products[0], tolerance=1e-5)


def test_dora_with_caches(tiny):
    found = []
    for model in pair(tiny, use_dora=True):
        model.eval()
        with DoraCaching(), torch.no_grad():
            model(input_ids=ids(tiny))
            found.append({"logits": model(input_ids=ids(tiny)).logits})
    tiny.assert_close(found[1], found[0])


def test_a_loaded_adapter_is_swapped_in(tiny, tmp_path):
    found = []
    for number, model in enumerate(pair(tiny)):
        model.eval()
        model.save_pretrained(tmp_path / str(number))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        model.load_adapter(tmp_path / str(number), adapter_name="default", hotswap=True)
        found.append({"logits": model(input_ids=ids(tiny)).logits.detach()})
        assert isinstance(model, PeftModel)
    tiny.assert_close(found[1], found[0])


# --- moved while closed


def changes(model):
    half = {"to bf16": lambda m: m.to(torch.bfloat16), "half": lambda m: m.half()}
    return half | {
        "bfloat16": lambda m: m.bfloat16(),
        "double and back": lambda m: m.double().float(),
        "to device": lambda m: m.to("cpu", torch.float16),
        "one block": lambda m: m.base_model.model.model.layers[0].to(torch.bfloat16) and m,
        "through _apply": lambda m: m._apply(lambda t: t.to(torch.float16)),
    }


@pytest.mark.parametrize("name", changes(None))
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_is_moved_while_closed_is_moved_as_if_open(tiny, name, use_dora):
    change = changes(None)[name]
    config = tiny.config(use_dora=use_dora)
    models = [tiny.attached(config, tiny.base(dtype=torch.float32)) for _ in range(2)]
    ila.apply_mask(models[0], tiny.mask(models[0], lambda at, name: at % 2 == 0))
    found = []
    for model in models:
        change(model)
        ila.apply_mask(model, tiny.mask(model, lambda at, name: False))
        found.append(tiny.state_of(model))
    assert len({t.dtype for t in found[1].values()}) <= 2
    tiny.assert_equal(found[0], found[1])

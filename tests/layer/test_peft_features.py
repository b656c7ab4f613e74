"""Whatever PEFT can do with a LoRA layer, it can do with ours, and the numbers are the same."""

import copy
import pickle
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from torch import nn

import ila
from ila_kernels.testing import assert_within_rounding

DELETED = "ignore:Adapter .* was active which is now deleted"


def paths(model: nn.Module) -> set[str]:
    return set(ila.explain(model).paths())


def each(models, method: str, *args, **kwargs) -> None:
    for model in models:
        getattr(model, method)(*args, **kwargs)


def add_second(models, config: LoraConfig, name: str = "second") -> None:
    for model in models:
        torch.manual_seed(4)
        model.add_adapter(name, copy.deepcopy(config))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_outputs_and_gradients_are_those_of_peft(pair, tiny, family):
    plain, ours = pair(family=family)
    expected = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), expected)
    assert len(expected) == 1 + 2 * 6 * 2  # logits, A and B, six kinds of layers, two blocks
    assert paths(ours) == {"eager"}
    with plain.disable_adapter():
        assert tiny.differs(tiny.run(plain), expected)


# --- several adapters


def test_added_adapter_is_computed_once_it_is_active(pair, tiny):
    models = plain, ours = pair()
    add_second(models, tiny.config(r=3, target_modules=["q_proj", "up_proj"]))
    first = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), first)
    each(models, "set_adapter", "second")
    second = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), second)
    assert tiny.differs(first, second)
    assert {name.split(".")[-2] for name in second if name != "logits"} == {"second"}


def test_two_adapters_active_at_once_add_up(pair, tiny):
    models = plain, ours = pair()
    add_second(models, tiny.config(r=3))
    one = tiny.run(plain)
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    both = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), both)
    assert tiny.differs(one, both)
    assert {row.why for row in ila.explain(ours)} == {"several adapters are active"}
    each(models, "set_adapter", "default")
    tiny.assert_close(tiny.run(ours), one)


def test_rows_of_one_batch_may_use_different_adapters(pair, tiny):
    models = plain, ours = pair()
    add_second(models, tiny.config(r=3, target_modules=["q_proj", "up_proj"]))
    each(models, "eval")
    names = ["default", "__base__", "second"]
    mixed = tiny.run(plain, adapter_names=names)
    tiny.assert_close(tiny.run(ours, adapter_names=names), mixed)
    with ours.disable_adapter():
        base = tiny.run(ours)["logits"]
    assert torch.allclose(mixed["logits"][1], base[1], rtol=0, atol=1e-12)
    assert not torch.allclose(mixed["logits"][0], base[0], atol=1e-3)
    with pytest.raises(ValueError, match="same as the number of inputs"):
        ours(input_ids=tiny.tokens(), adapter_names=names[:2])


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters_are_those_of_peft(pair, tiny, combination):
    models = plain, ours = pair()
    add_second(models, tiny.config(target_modules=["q_proj", "up_proj"]))
    arguments = ["default", "second"], [0.7, -0.3], "sum"
    each(models, "add_weighted_adapter", *arguments, combination_type=combination)
    each(models, "set_adapter", "sum")
    expected = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), expected, 1e-9)  # an SVD has free signs
    tiny.assert_close(tiny.state_of(ours), tiny.state_of(plain), 1e-9)


@pytest.mark.filterwarnings(DELETED)
def test_deleted_adapter_leaves_the_other_one_active(pair, tiny):
    models = plain, ours = pair()
    add_second(models, tiny.config(r=3))
    each(models, "delete_adapter", "default")
    assert plain.active_adapters == ours.active_adapters == ["second"]
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    tiny.assert_equal(tiny.state_of(ours), tiny.state_of(plain))


def test_model_whose_only_adapter_is_deleted_is_the_base_model(pair, tiny):
    models = plain, ours = pair()
    each(models, "delete_adapter", "default")
    # PEFT's outermost forward looks up the configuration of the active adapter: there is none now.
    plain, ours = plain.base_model.model, ours.base_model.model
    tiny.assert_equal(tiny.run(ours), tiny.run(plain))
    tiny.assert_equal(tiny.run(ours), {"logits": tiny.run(tiny.base())["logits"]})
    assert paths(ours) == {"bare"}


# --- disabling, merging, unloading


def test_disabled_adapters_leave_the_base_model(pair, tiny):
    plain, ours = pair()
    enabled = tiny.run(ours)
    with plain.disable_adapter(), ours.disable_adapter():
        off = tiny.run(ours)
        tiny.assert_equal(off, tiny.run(plain))
        assert {row.why for row in ila.explain(ours)} == {"adapters are disabled"}
    assert torch.equal(off["logits"], tiny.base()(tiny.tokens()).logits)
    tiny.assert_equal(tiny.run(ours), enabled)


def test_adapter_layers_can_be_disabled_and_enabled_again(pair, tiny):
    models = pair()
    for model in models:
        model.base_model.disable_adapter_layers()
    tiny.assert_equal(tiny.run(models[1]), tiny.run(models[0]))
    for model in models:
        model.base_model.enable_adapter_layers()
    expected = tiny.run(models[0])
    tiny.assert_close(tiny.run(models[1]), expected)
    assert len(expected) > 1


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unmerging_is_that_of_peft(pair, tiny, safe_merge):
    models = plain, ours = pair()
    before, weights = tiny.run(ours), tiny.state_of(ours)
    each(models, "merge_adapter", safe_merge=safe_merge)
    tiny.assert_equal(tiny.state_of(ours), tiny.state_of(plain))
    merged = tiny.run(ours)
    tiny.assert_equal(merged, tiny.run(plain))
    tiny.assert_close({"logits": merged["logits"]}, {"logits": before["logits"]})
    assert {row.why for row in ila.explain(ours)} == {"an adapter is merged into the base weight"}
    each(models, "unmerge_adapter")
    tiny.assert_close(tiny.state_of(ours), weights)
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    assert paths(ours) == {"eager"}


def test_safe_merge_refuses_what_is_not_a_number(pair, tiny):
    _, ours = pair()
    layer = tiny.layers(ours)["base_model.model.model.layers.0.self_attn.q_proj"]
    weight = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert layer.merged_adapters == []


def test_one_of_two_adapters_can_be_merged(pair, tiny):
    models = plain, ours = pair()
    add_second(models, tiny.config(r=3))
    each(models, "merge_adapter", ["second"])
    merged = tiny.run(plain)
    tiny.assert_equal(tiny.run(ours), merged)
    # A merged layer computes its base weight alone; an active adapter that is not merged waits.
    each(models, "unmerge_adapter")
    assert tiny.differs(tiny.run(ours), merged)


def test_disabling_unmerges(pair, tiny):
    plain, ours = pair()
    for model in (plain, ours):
        model.merge_adapter()
        with model.disable_adapter():
            model(tiny.tokens())
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    assert paths(ours) == {"eager"}


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloaded_model_has_no_trace_of_adapters(pair, tiny, method):
    plain, ours = pair()
    with_adapter = tiny.run(ours)
    plain, ours = getattr(plain, method)(), getattr(ours, method)()
    assert [type(m) for m in ours.modules()] == [type(m) for m in tiny.base().modules()]
    tiny.assert_equal(tiny.state_of(ours), tiny.state_of(plain))
    result = ours(tiny.tokens()).logits
    assert torch.equal(result, plain(tiny.tokens()).logits)
    assert tiny.differs({"logits": result}, with_adapter) == (method == "unload")


# --- scaling, ranks, initialisations, variants


def test_scale_can_be_changed_and_reset(pair, tiny):
    models = plain, ours = pair()
    first = tiny.run(ours)
    edits = [
        lambda layer: layer.set_scale("default", 0.3),
        lambda layer: layer.scale_layer(5),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.set_scale("default", 0),
        lambda layer: layer.set_scale("default", -1.5),
        lambda layer: layer.unscale_layer(),
    ]
    for edit in edits:
        for model in models:
            for module in model.modules():
                if isinstance(module, Linear):
                    edit(module)
        last = tiny.run(ours)
        tiny.assert_close(last, tiny.run(plain))
    tiny.assert_equal(last, first)


PATTERNS = {"rank_pattern": {"q_proj": 1, "down_proj": 7}, "alpha_pattern": {"k_proj": 23}}
FUSED = {
    "rslora": {"use_rslora": True},
    "rank and alpha patterns": PATTERNS,
    "rank above the width": {"r": 40},
    "gaussian": {"init_lora_weights": "gaussian"},
    "zero B": {"init_lora_weights": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by subspace iterations": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "one block": {"layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*\.1\.(self_attn|mlp)\.(v|up)_proj"},
    "all-linear without some": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
}


@pytest.mark.parametrize("changes", FUSED.values(), ids=FUSED)
def test_plain_lora_of_every_kind_is_fused_and_equals_peft(pair, tiny, changes):
    plain, ours = pair(tiny.config(**changes), dtype=torch.float32)
    each((plain, ours), "double")
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    assert paths(ours) == {"eager"}


VARIANTS = {
    "DoRA": {"use_dora": True},
    "LoRA bias": {"lora_bias": True},
    "aLoRA": {"alora_invocation_tokens": [17, 34]},
    "MiCA": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed but")
def test_variants_run_the_code_of_peft_bit_for_bit(pair, tiny, name):
    biases = {"attention_bias": True, "mlp_bias": True}
    plain, ours = pair(tiny.config(**VARIANTS[name]), dtype=torch.float32, **biases)
    expected = tiny.run(plain)
    tiny.assert_equal(tiny.run(ours), expected)
    assert len(expected) > 1
    assert paths(ours) == {"peft"}
    (why,) = {row.why for row in ila.explain(ours)}
    assert why in {"LoRA variant Dora", "lora_bias=True", "LoRA variant ALora", "LoRA variant MiCA"}


def test_alora_starts_at_its_invocation_tokens(pair, tiny):
    plain, ours = pair(tiny.config(**VARIANTS["aLoRA"]), dtype=torch.float32)
    expected = tiny.run(plain, alora_offsets=[6, None, 2])
    tiny.assert_equal(tiny.run(ours, alora_offsets=[6, None, 2]), expected)
    assert tiny.differs(expected, tiny.run(plain, alora_offsets=[None] * 3))


def test_dora_beside_a_plain_adapter_takes_the_path_of_the_active_one(pair, tiny):
    models = plain, ours = pair(tiny.config(use_dora=True))
    add_second(models, tiny.config(r=3))
    tiny.assert_equal(tiny.run(ours), tiny.run(plain))
    each(models, "set_adapter", "second")
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    assert paths(ours) == {"eager"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_base_biases_are_trained_as_in_peft(pair, tiny, bias):
    biases = {"attention_bias": True, "mlp_bias": True}
    plain, ours = pair(tiny.config(bias=bias, target_modules=["q_proj", "up_proj"]), **biases)
    expected = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), expected)
    kinds = {name.split(".")[-3] for name in expected if name.endswith("base_layer.bias")}
    assert kinds == {"q_proj", "up_proj"}
    assert ("base_model.model.model.layers.0.mlp.down_proj.bias" in expected) == (bias == "all")


def test_modules_to_save_are_trained_beside_the_adapter(pair, tiny):
    plain, ours = pair(tiny.config(modules_to_save=["lm_head", "layers.0.input_layernorm"]))
    expected = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), expected)
    assert {name for name in expected if "modules_to_save" in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.layers.0.input_layernorm.modules_to_save.default.weight",
    }


# --- dropout and checkpointing


def test_dropout_is_off_in_evaluation(pair, tiny):
    models = plain, ours = pair(tiny.config(lora_dropout=0.4))
    each(models, "eval")
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    tiny.assert_close(tiny.run(ours), tiny.run(ours), 0.0)


def test_dropout_follows_the_seed_and_has_the_mean_of_peft(pair, tiny):
    config = tiny.config(lora_dropout=0.4)
    plain, ours = pair(config, dtype=torch.float32)
    each((plain, ours), "train")

    def seeded(model, value):
        torch.manual_seed(value)
        return tiny.run(model)

    first = seeded(ours, 5)
    tiny.assert_equal(seeded(ours, 5), first)
    assert tiny.differs(seeded(ours, 6), first)

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    x = torch.randn(1, 32).expand(20000, 32)  # 20,000 draws of the mask of one row
    means, spreads = [], []
    with torch.no_grad():
        for model in (plain, ours):
            layer = model.get_submodule(name)
            delta = layer(x) - layer.base_layer(x)
            means.append(delta.mean(0))
            spreads.append(delta.std(0))
        exact = layer.lora_B["default"](layer.lora_A["default"](x[:1])) * layer.scaling["default"]
    for mean, spread in zip(means, spreads, strict=True):
        # Six standard errors: a chance of 1e-7 over 32 columns, and the seed is fixed.
        assert ((mean - exact[0]).abs() <= 6 * spread / 20000**0.5).all()
    assert torch.allclose(spreads[0], spreads[1], rtol=0.05)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
def test_checkpointing_recomputes_the_same_layer(pair, tiny, lora_dropout, use_reentrant):
    plain, ours = pair(tiny.config(lora_dropout=lora_dropout))
    each((plain, ours), "train")
    torch.manual_seed(5)
    stored = tiny.run(ours)
    for model in (plain, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    recomputed = tiny.run(ours)
    tiny.assert_close(recomputed, stored)
    if lora_dropout == 0:
        tiny.assert_close(recomputed, tiny.run(plain))


def test_input_gradient_is_that_of_peft(pair, tiny):
    grads = []
    for model in pair():
        embeddings = model.get_input_embeddings()(tiny.tokens()).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.square().sum().backward()
        grads.append({"x": embeddings.grad})
    tiny.assert_close(grads[1], grads[0])


# --- saving, loading, copying


def test_state_dict_has_the_keys_and_tensors_of_peft(pair, tiny):
    plain, ours = pair()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in plain.named_buffers()]
    other = tiny.state_of(plain)
    for name in other:
        other[name].mul_(0.5)
    ours.load_state_dict(other, strict=True)
    tiny.assert_equal(tiny.state_of(ours), other)


def test_saved_files_are_those_of_peft(pair, tiny, tmp_path):
    plain, ours = pair(tiny.config(**PATTERNS, use_rslora=True, modules_to_save=["norm"]))
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "plain")]
    tiny.assert_equal(*tensors)
    ours_json, plain_json = (
        (tmp_path / who / "adapter_config.json").read_text() for who in ("ours", "plain")
    )
    # target_modules is a set, whose order is that of its hashes.
    assert sorted(re.findall(r"[^\s,]+", ours_json)) == sorted(re.findall(r"[^\s,]+", plain_json))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_can_be_loaded_and_converted(pair, tiny, tmp_path, low_cpu_mem_usage):
    _, ours = pair()
    ours.save_pretrained(tmp_path)
    options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(tiny.base(), tmp_path, **options)
    tiny.assert_close(tiny.run(loaded), tiny.run(ours))
    ila.convert(loaded)
    tiny.assert_equal(tiny.run(loaded), tiny.run(ours))


def test_adapter_can_be_loaded_into_a_model_of_ours(pair, tiny, tmp_path):
    other = tiny.plain(tiny.config(r=2, target_modules=["q_proj", "v_proj"]))
    other.save_pretrained(tmp_path)
    models = plain, ours = pair()
    each(models, "load_adapter", tmp_path, "loaded", is_trainable=True)
    each(models, "set_adapter", "loaded")
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    assert paths(ours) == {"eager", "bare"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    held = {k.replace(".loaded", ""): v for k, v in tiny.state_of(ours).items() if ".loaded." in k}
    tiny.assert_equal(held, saved)


def test_attach_can_leave_adapters_on_meta_until_weights_come(tiny):
    plain = tiny.plain(tiny.config())
    ours = tiny.attached(tiny.config(), low_cpu_mem_usage=True)
    adapters = {n: p for n, p in ours.named_parameters() if ".lora_" in n}
    assert {p.device.type for p in adapters.values()} == {"meta"}
    ours.load_state_dict(plain.state_dict(), assign=True)
    tiny.assert_close(tiny.run(ours), tiny.run(plain))


def test_autocast_adapter_dtype_reaches_peft(tiny):
    for flag, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = tiny.base(dtype=torch.bfloat16)
        ours = tiny.attached(tiny.config(), base, autocast_adapter_dtype=flag)
        assert {p.dtype for n, p in ours.named_parameters() if ".lora_" in n} == {dtype}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copy_is_equal_and_apart(pair, tiny, way):
    _, ours = pair(tiny.config(lora_dropout=0.1))
    ours.eval()
    ila.apply_mask(ours, tiny.mask(ours, lambda i, name: i < 3))
    twin = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    tiny.assert_equal(tiny.state_of(twin), tiny.state_of(ours))
    before = tiny.run(ours)
    tiny.assert_equal(tiny.run(twin), before)
    for model in (twin, ours):
        ila.apply_mask(model, tiny.mask(model, lambda i, name: False))
    opened = tiny.run(ours)
    tiny.assert_equal(tiny.run(twin), opened)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    tiny.assert_equal(tiny.run(ours), opened)


# --- dtypes


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["fp32 adapter", "same dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_right_as_peft(pair, tiny, dtype, adapter_dtype, autocast):
    plain, ours = pair(dtype=dtype)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    layers = [model.get_submodule(name) for model in (plain, ours)]
    if adapter_dtype is None:
        for layer in layers:
            layer.to(dtype)
    exact = copy.deepcopy(layers[0]).double()
    x = torch.randn(5, 9, 48, dtype=torch.float64).to(dtype)
    dy = torch.randn(5, 9, 32, dtype=torch.float64).to(dtype)
    results = []
    for layer, cast in ((exact, False), (layers[0], autocast), (layers[1], autocast)):
        leaf = x.to(layer.weight.dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=cast):
            y = layer(leaf)
        y.backward(dy.to(y.dtype))
        grads = {k: p.grad for k, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": leaf.grad} | grads)
    expected, peft, actual = results
    assert set(actual) == set(peft)
    for key, value in actual.items():
        assert value.dtype == peft[key].dtype, key
        # dA and dB of fp32 parameters pass through the compute dtype here: that is what counts.
        own = peft[key].to(dtype) if key not in ("y", "x") else peft[key]
        assert_within_rounding(value, expected[key], own, key)


def test_fp32_base_under_autocast_computes_in_the_dtype_of_autocast(pair, tiny):
    plain, ours = pair(dtype=torch.float32)
    layer, theirs = (
        m.get_submodule("base_model.model.model.layers.1.self_attn.q_proj") for m in (ours, plain)
    )
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), theirs(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_within_rounding(y, copy.deepcopy(theirs).double()(x.double()), expected)


# --- printing, compiling, hooks


def test_repr_is_that_of_peft_but_for_the_class_and_the_scores(pair):
    plain, ours = pair()
    mine = [line for line in repr(ours).splitlines() if "lora_S" not in line]
    theirs = {
        "lora.MaskedLoraLinear": "lora.Linear",
        "LeanLlamaMLP": "LlamaMLP",
        "FusedQkvLlamaAttention": "LlamaAttention",
    }
    for own, name in theirs.items():
        mine = [line.replace(own, name) for line in mine]
    assert mine == repr(plain).splitlines()
    assert repr(next(m for m in ours.modules() if isinstance(m, Linear))).startswith(
        "lora.MaskedLoraLinear("
    )


def test_trainable_parameters_are_counted_as_in_peft(pair, tiny, capsys):
    plain, ours = pair()
    each((plain, ours), "print_trainable_parameters")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    ila.apply_mask(ours, tiny.mask(ours, lambda i, name: i > 0))
    assert ours.get_nb_trainable_parameters()[0] == 4 * (32 + 32)


COMPILED = {
    "fused": ("aot_eager", {}, False),
    "dropout in evaluation": ("aot_eager", {"lora_dropout": 0.3}, False),
    "closed": ("aot_eager", {}, True),
    "PEFT's own forward": ("aot_eager", {"init_lora_weights": "mica"}, False),
    "fused by inductor": ("inductor", {}, False),
}


@pytest.mark.parametrize("case", COMPILED)
def test_layer_compiles_without_graph_breaks(tiny, case):
    backend, changes, closed = COMPILED[case]
    model = tiny.converted(tiny.config(**changes), tiny.base(dtype=torch.float32)).eval()
    if closed:
        ila.apply_mask(model, tiny.mask(model, lambda i, name: i == 0))
    layer = next(iter(tiny.layers(model).values()))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for forward in (layer, compiled):
        model.zero_grad(set_to_none=True)
        x = torch.arange(96.0).view(3, 32).sin().requires_grad_()
        y = forward(x)
        y.backward(y.detach().cos())
        grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad} | grads)
    tiny.assert_close(results[1], results[0], 1e-5)
    assert len(results[0]) == (2 if closed else 3 if case == "PEFT's own forward" else 4)
    torch.compiler.reset()


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", ""])
def test_forward_hooks_fire_and_may_change_the_output(pair, tiny, part):
    plain, ours = pair()
    unhooked = tiny.run(ours)
    name = "base_model.model.model.layers.0.mlp.gate_proj"
    for model in (plain, ours):
        module = model.get_submodule(f"{name}.{part}".rstrip("."))
        handle = module.register_forward_hook(lambda module, args, output: output * 2)
    expected = tiny.run(plain)
    tiny.assert_close(tiny.run(ours), expected)
    assert tiny.differs(expected, unhooked)
    handle.remove()
    tiny.assert_equal(tiny.run(ours), unhooked)
    assert paths(ours) == {"eager"}


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_backward_hooks_and_pre_hooks_fire(pair, tiny, part):
    seen = {0: [], 1: []}
    for index, model in enumerate(pair()):
        module = model.get_submodule(f"base_model.model.model.layers.0.mlp.gate_proj.{part}")
        log = seen[index]
        module.register_forward_pre_hook(lambda m, args, log=log: log.append(args[0].detach()))
        module.register_full_backward_hook(lambda m, dx, dy, log=log: log.append(dy[0].detach()))
        tiny.run(model)
    assert len(seen[0]) == len(seen[1]) == 2
    for theirs, mine in zip(seen[0], seen[1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_dropout.default"])
def test_forward_replaced_on_the_instance_is_called(pair, tiny, part):
    # accelerate's dispatch does this to the layers of an offloaded model.
    plain, ours = pair(tiny.config(lora_dropout=0.1))
    each((plain, ours), "eval")
    for model in (plain, ours):
        module = model.get_submodule(f"base_model.model.model.layers.0.mlp.gate_proj.{part}")
        module.forward = lambda x, forward=module.forward: forward(x) * 2
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    rows = {row.module: row for row in ila.explain(ours)}
    assert rows["base_model.model.model.layers.0.mlp.gate_proj"].path == "peft"

"""Experts and routers of a mixture are layers of a mask: adapted tensors, computed by PEFT."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.helpers import KappaTuneSelector
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import ila
from ila.commands.mask_formats import text_of
from ila.models.blocks import frozen_blocks
from ila.models.edit import masked_layers
from ila.models.merge import merge
from ila.models.open_weights import open_layers
from ila.models.tensors import MaskedTensor, named_layers, record_of_tensors
from ila.prefix.frozen_prefix import Prefix
from ila.search.adapter_updates import AdapterUpdates
from ila.search.baselines import GradientNorm, update_norms
from ila.search.gate_gradients import GateGradient
from ila.search.learn import SearchConfig, begin
from ila.search.spectra import by_weights, signal_to_noise
from ila.training.adapter import Adapter, load_adapter, save_adapter

# PEFT looks for the pattern of the experts among modules, and finds them among parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
SIZES |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2}
SIZES |= {"experts_implementation": "eager"}  # the fused ones have no fp64
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, head_dim=8)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)),
}
BLOCK0 = "base_model.model.model.layers.0."
LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"]
TENSORS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Which layers are closed: both tensors of a module, one of two, none of them, the router.
CLOSED = {
    "first block": lambda name: name.startswith(BLOCK0),
    "outer tensors": lambda name: name.endswith("experts.down_proj"),
    "inner tensors": lambda name: name.endswith("experts.gate_up_proj"),
    "inner of one block": lambda name: name == f"{BLOCK0}mlp.experts.gate_up_proj",
    "experts": lambda name: ".experts." in name,
    "routers": lambda name: name.endswith(".gate"),
    "attention": lambda name: "self_attn" in name,
}


def mask_of(model, closed):
    names = masked_layers(model, "default")
    return ila.LayerMask(dict.fromkeys(names, 1.0), {n: not closed(n) for n in names})


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    torch.manual_seed(1)
    base = FAMILIES[request.param]()
    base.save_pretrained(tmp_path / "base")
    return base


@pytest.fixture
def model(base, tiny):
    return tiny.attached(tiny.config(target_modules="all-linear"), base).eval()


def again(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_layer_of_a_mask_has_the_name_of_its_tensor(model):
    names = list(masked_layers(model, "default"))
    router = "mlp.gate"
    for block in "01":
        own = [n.partition(f"layers.{block}.")[2] for n in names if f"layers.{block}." in n]
        assert sorted(own) == sorted([*LINEAR, *TENSORS, router])
        assert [name for name in own if name in TENSORS] == TENSORS
    parameters = dict(model.get_base_model().named_parameters())
    record = record_of_tensors(masked_layers(model, "default"))["target_parameters"]
    assert len(record) == 6 and set(record) <= set(names)
    config = model.peft_config["default"]
    assert all(name.endswith(tuple(config.target_parameters)) for name in record.values())
    assert all(".".join(n.split(".")[:-1]) in str(list(parameters)) for n in record.values())


@pytest.mark.parametrize("how", ["drop", "keep"])
def test_nothing_lies_outside_and_the_share_is_the_parameters_that_train(model, how):
    layers = masked_layers(model, "default")
    assert ila.apply_mask(model, mask_of(model, lambda name: False)).outside.parameters == 0
    whole = trained(model)
    mask = mask_of(model, CLOSED["first block"])
    report = ila.apply_mask(model, mask, closed=how)
    assert report.outside.parameters == 0 and str(report).startswith("adapter 'default': 7 of 14")
    opened = sum(p.numel() for n in mask.open for p in layers[n].adapter_parameters("default"))
    counts = Adapter(model).counts()
    assert 0 < opened == counts["trainable_parameters"] == trained(model) == whole // 2
    assert "outside_parameters" not in counts
    assert (counts["open_modules"], counts["total_modules"]) == (7, 14)
    assert frozen_blocks(model) == 1
    assert ila.gradient_checkpointing(model) == 1


def oracle_of(base, tiny, closed, how):
    """Plain PEFT: a closed layer is frozen, and has no update where it is dropped."""
    plain = tiny.plain(tiny.config(target_modules="all-linear"), base)
    for name, layer in named_layers(plain, LoraLayer).items():
        if closed(name):
            if how == "drop":
                nn.init.zeros_(layer.lora_B["default"].weight)
            for part in (layer.lora_A, layer.lora_B):
                part["default"].weight.requires_grad_(False)
    return plain


@pytest.mark.parametrize("how", ["drop", "keep"])
@pytest.mark.parametrize("closed", CLOSED)
def test_loss_and_gradients_are_those_of_plain_peft(base, tiny, closed, how):
    base = base.double()
    ours = tiny.attached(tiny.config(target_modules="all-linear"), copy.deepcopy(base)).train()
    expected = tiny.run(oracle_of(base, tiny, CLOSED[closed], how).train())
    all_open = tiny.run(ours)
    ila.apply_mask(ours, mask_of(ours, CLOSED[closed]), closed=how)
    found = tiny.run(ours)
    assert len(found) < len(all_open)
    tiny.assert_close(found, expected, 1e-10)
    assert how == "keep" or tiny.differs(found, all_open)
    for reentrant in (False, True):
        ila.gradient_checkpointing(ours, use_reentrant=reentrant)
        tiny.assert_close(tiny.run(ours), expected, 1e-10)


def test_a_dropped_tensor_costs_no_sum_and_a_prefix_makes_no_graph(model, tiny, monkeypatch):
    summed = []
    register = nn.utils.parametrize.register_parametrization

    def count(module, name, *args, **kwargs):
        summed.append(name)
        return register(module, name, *args, **kwargs)

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", count)
    for closed, expected in (
        (lambda name: False, 6),
        (CLOSED["first block"], 3),
        (CLOSED["inner tensors"], 4),
        (lambda name: "mlp" in name, 0),
    ):
        ila.apply_mask(model, mask_of(model, closed))
        summed.clear()
        model(tiny.tokens())
        assert len(summed) == expected
    ila.apply_mask(model, mask_of(model, CLOSED["first block"]), closed="keep")
    seen = []
    block = model.get_submodule(BLOCK0.removesuffix("."))
    block.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    model.train()
    model(tiny.tokens()).logits.sum().backward()
    assert seen == [False]


@pytest.mark.parametrize("how", ["drop", "keep"])
def test_a_closed_tensor_has_no_gradient_and_no_state_in_the_optimiser(model, tiny, how):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tiny.tokens()

    def step():
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    mask, layers = mask_of(model, CLOSED["inner of one block"]), masked_layers(model, "default")
    closed = layers[f"{BLOCK0}mlp.experts.gate_up_proj"]
    own = set(closed.adapter_parameters("default"))
    held = len(optimizer.state)
    ila.apply_mask(model, mask, closed=how, optimizer=optimizer)
    before = [p.detach().clone() for p in own]
    step()
    assert len(optimizer.state) == held - len(own) == held - 2
    assert not own & {p for group in optimizer.param_groups for p in group["params"]}
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(own, before, strict=True))
    sibling = layers[f"{BLOCK0}mlp.experts.down_proj"].lora_B["default"].weight
    assert sibling.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["drop", "keep"])
@pytest.mark.parametrize("closed", CLOSED)
def test_the_saved_adapter_holds_the_open_layers_and_loads_in_plain_peft(
    model, tiny, tmp_path, closed, how
):
    mask = mask_of(model, CLOSED[closed])
    ila.apply_mask(model, mask, closed=how)
    expected = model(tiny.tokens()).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(again(tmp_path), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(tiny.tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    there = named_layers(plain, LoraLayer)
    assert set(there) == (set(mask.open) if how == "drop" else set(mask.scores))
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
    tiny.assert_equal(ours, theirs)
    whole = merge(plain)
    torch.testing.assert_close(whole(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    merged = merge(model)
    torch.testing.assert_close(merged(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("closed", CLOSED)
def test_a_saved_adapter_comes_back_into_a_model_with_the_same_mask(model, tiny, tmp_path, closed):
    ila.apply_mask(model, mask_of(model, CLOSED[closed]))
    expected, state = model(tiny.tokens()).logits, tiny.state_of(model)
    save_adapter(model, "default", tmp_path / "adapter")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    assert tiny.differs({"logits": model(tiny.tokens()).logits}, {"logits": expected})
    load_adapter(model, "default", tmp_path / "adapter")
    assert torch.equal(model(tiny.tokens()).logits, expected)
    model.load_state_dict(state)
    tiny.assert_equal(tiny.state_of(model), state)


@pytest.mark.parametrize("how", ["drop", "keep"])
def test_opened_and_restored_the_model_is_what_peft_made(base, tiny, how):
    config = tiny.config(target_modules="all-linear")
    plain = tiny.plain(config, copy.deepcopy(base))
    model = tiny.attached(config, base)
    own = model.peft_config["default"]
    before = (own.target_modules, own.target_parameters, own.rank_pattern)
    for name in ("experts", "inner of one block", "first block"):
        ila.apply_mask(model, mask_of(model, CLOSED[name]), closed=how)
    ila.apply_mask(model, mask_of(model, lambda name: False))
    assert (own.target_modules, own.target_parameters, own.rank_pattern) == before
    tiny.assert_equal(tiny.state_of(model), tiny.state_of(plain))
    ila.apply_mask(model, mask_of(model, CLOSED["first block"]), closed=how)
    report = ila.restore(model)
    assert len(report.swapped) == 14
    assert sum(type(m) is ParamWrapper for m in model.modules()) == 6
    tiny.assert_equal(tiny.state_of(model), tiny.state_of(plain))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }


def test_a_converted_model_has_the_same_layers(base, tiny):
    config, base = tiny.config(target_modules="all-linear"), base.double()
    ours = tiny.attached(config, copy.deepcopy(base))
    plain = tiny.plain(config, base)
    expected = tiny.run(plain)
    report = ila.convert(plain)
    assert list(report.swapped) and set(report.swapped) == set(masked_layers(ours, "default"))
    tiny.assert_close(tiny.run(plain), expected, 1e-10)
    tiny.assert_equal(tiny.run(plain), tiny.run(ours))
    for model in (ours, plain):
        ila.apply_mask(model, mask_of(model, CLOSED["outer tensors"]))
    tiny.assert_equal(tiny.state_of(ours), tiny.state_of(plain))


@pytest.mark.parametrize("closed", ["drop", "keep"])
def test_tensors_are_scored_and_closed_between_two_steps(model, tiny, closed):
    ids = tiny.tokens()
    batches = [{"input_ids": ids, "labels": ids.roll(i, 0)} for i in range(5)]
    optimizer = torch.optim.AdamW(model.parameters())
    before = tiny.state_of(model)
    mask = ila.select_layers(model, batches, optimizer=optimizer, closed=closed, top=0.5)
    assert len(mask) == 14 and len(mask.open) == 7
    assert len(mask.provenance["target_parameters"]) == 6
    held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    assert held == {p for p in model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in held) == Adapter(model).counts()["trainable_parameters"]
    ila.apply_mask(model, mask_of(model, lambda name: False))
    tiny.assert_equal(tiny.state_of(model), before)


def test_the_callback_refuses_to_drop_tensors_of_one_module(model):
    alone = SimpleNamespace(world_size=1, deepspeed=None)
    state = SimpleNamespace(max_steps=4, global_step=0, stateful_callbacks={})
    ila.SelectLayers(at=2, top=0.5).on_train_begin(alone, state, None, model=model)
    dropping = ila.SelectLayers(at=2, top=0.5, closed="drop")
    with pytest.raises(ValueError, match=r"closed='keep' where two tensors .* got 'drop'"):
        dropping.on_train_begin(alone, state, None, model=model)


def test_a_second_adapter_finds_its_wrappers(model, tiny):
    torch.manual_seed(5)
    model.add_adapter("other", tiny.config(target_modules="all-linear"))
    both = named_layers(model, MaskedTensor)
    assert len(both) == 6 and all(set(m.lora_A) == {"default", "other"} for m in both.values())
    model.set_adapter("other")
    expected = model(tiny.tokens()).logits
    ila.apply_mask(model, mask_of(model, CLOSED["outer tensors"]), adapter_name="default")
    assert torch.equal(model(tiny.tokens()).logits, expected)
    names = set(get_peft_model_state_dict(model, adapter_name="default"))
    inner = f"{BLOCK0}mlp.experts.base_layer.lora_A.weight"
    assert inner not in names and inner.replace(".base_layer", "") in names
    assert inner in get_peft_model_state_dict(model, adapter_name="other")


def gradients_of_gates(model, ids, gamma):
    updates = AdapterUpdates(model)
    with updates.scored(torch.logit(torch.tensor(gamma, dtype=torch.float64)).item()):
        loss = model(ids, labels=ids).loss
        loss.backward()
        slope = gamma * (1 - gamma)
        scores = {n: each.lora_S["default"].grad for n, each in updates.layers.items()}
    return loss.item(), {n: (grad / slope).item() for n, grad in scores.items()}


def test_a_gate_scales_the_update_and_gets_its_gradient(base, tiny):
    model = tiny.attached(tiny.config(target_modules="all-linear"), base.double()).train()
    ids, gamma, layers = tiny.tokens(), 0.7, masked_layers(model, "default")
    loss, slopes = gradients_of_gates(model, ids, gamma)
    weights = {name: layer.lora_B["default"].weight for name, layer in layers.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(gamma)
    expected = model(ids, labels=ids).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)  # the loss is float32
    for name, weight in weights.items():
        # γ dL/dγ = ⟨dB, B⟩, with dB by PEFT's own layer.
        product = (weight.grad * weight).sum().item()
        assert gamma * slopes[name] == pytest.approx(product, rel=1e-5, abs=1e-8)
    assert any(abs(v) > 1e-5 for n, v in slopes.items() if ".experts." in n)
    assert any(abs(v) > 1e-5 for n, v in slopes.items() if n.endswith(".gate"))


def test_the_free_signal_and_the_norms_are_those_of_the_dense_updates(base, tiny):
    model = tiny.attached(tiny.config(target_modules="all-linear"), base.double()).train()
    ids, layers = tiny.tokens(), masked_layers(model, "default")
    norms = GradientNorm(layers, "default")
    model(ids, labels=ids).loss.backward()
    measured = dict(zip(layers, norms.values(), strict=True))
    free = dict(zip(layers, GateGradient(layers, "default").values(), strict=True))
    _, slopes = gradients_of_gates(model, ids, 1 - 1e-9)
    found = update_norms(layers, "default")
    for name, layer in layers.items():
        assert free[name].item() == pytest.approx(-slopes[name], rel=1e-5, abs=1e-9)
        dense = layer.get_delta_weight("default")
        assert found[name] == pytest.approx(dense.norm().item(), rel=1e-9)
        if not isinstance(layer, MaskedTensor):
            continue
        a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        experts, rank = layer.num_experts, layer.r["default"]
        squares = [
            (b.grad[:, torch.arange(rank) * experts + e] / layer.scaling["default"]).square().sum()
            * a.shape[1]
            / a[e * rank : (e + 1) * rank].square().sum()
            for e in range(experts)
        ]
        expected = sum(squares).sqrt() / layer.get_param().norm()
        assert measured[name].item() == pytest.approx(expected.item(), rel=1e-9)


def test_scores_by_the_weights_are_means_over_experts(model):
    layers = masked_layers(model, "default")
    kappa = by_weights(layers, "kappa")
    theirs = KappaTuneSelector(model.get_base_model(), show_progress=False)
    theirs._compute_kappas()
    inner = {
        n.replace(".base_layer", ""): k for n, k in theirs._parameter_condition_numbers.items()
    }
    assert len(inner) == 4
    for name, value in inner.items():
        assert -kappa[f"base_model.model.{name}"] == pytest.approx(value, rel=1e-4)
    ratios = by_weights(layers, "snr_overall")
    name = f"{BLOCK0}mlp.experts.down_proj"
    each = [signal_to_noise(matrix) for matrix in layers[name].get_param().detach()]
    assert ratios[name] == pytest.approx(sum(each) / 4)


@pytest.mark.parametrize("method", ["output_norm", "feature_norm"])
def test_a_method_that_reads_x_of_a_linear_layer_is_refused_by_name(model, method, tmp_path):
    with pytest.raises(ValueError, match=rf"method must not be '{method}' where experts .* 'path'"):
        begin(model, [], SearchConfig(method=method), folder=tmp_path, keep=False, resume=False,
              progress=False)  # fmt: skip


def test_explain_has_a_row_for_each_tensor(model):
    mask = mask_of(model, CLOSED["first block"])
    for how, path in (("drop", "bare"), ("keep", "peft")):
        ila.apply_mask(model, mask, closed=how)
        rows = {row.module: row for row in ila.explain(model, 100)}
        assert list(rows) == list(mask.scores)
        low, high = (rows[f"{BLOCK0.replace('0', at)}{TENSORS[0]}"] for at in "01")
        assert (low.open, low.path, low.in_prefix, low.saved_bytes) == (False, path, True, 0)
        assert (high.open, high.path, high.in_prefix, high.saved_bytes) == (
            True,
            "peft",
            False,
            None,
        )
        assert "PEFT adds its update" in high.why
    ila.apply_mask(model, mask_of(model, CLOSED["experts"]), closed="keep")
    rows = {row.module: row for row in ila.explain(model, 100)}
    crossed = rows[f"{BLOCK0.replace('0', '1')}{TENSORS[0]}"]
    assert not crossed.open and crossed.saved_bytes is None  # PEFT keeps W + ΔW for dx


def test_full_training_opens_linear_layers_and_refuses_a_tensor_by_name(base, tiny):
    make = lambda: tiny.attached(tiny.config(target_modules="all-linear"), copy.deepcopy(base))  # noqa: E731
    opened = open_layers(make())
    assert {name.partition("self_attn.")[2] for name in opened.names} == {
        f"{name}_proj" for name in "qkvo"
    }
    assert len(opened.names) == opened.total == 8
    learned = {f"base_model.model.{name}": 1.0 for name in opened.names}
    gates = {name: name.endswith("q_proj") for name in learned}
    for mask in (
        ila.LayerMask(learned, gates),  # of `ila learn --full`
        mask_of(make(), lambda name: not name.endswith("q_proj")),
    ):
        assert open_layers(make(), mask).names == (
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
        )
    with pytest.raises(ValueError, match=r"mlp\.[\w.]+' must be a plain nn.Linear .* a tensor"):
        open_layers(make(), mask_of(make(), CLOSED["attention"]))


def test_a_loss_with_the_balance_of_experts_is_not_cached(model):
    ila.apply_mask(model, mask_of(model, CLOSED["first block"]))
    assert Prefix.of(model, torch.no_grad).depth == 1
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True"):
        Prefix.of(model, torch.no_grad)


def test_formats_name_tensors_apart(model):
    mask = mask_of(model, lambda name: "layers.0" in name or "self_attn" in name)
    mask = mask.with_provenance(**record_of_tensors(masked_layers(model, "default")))
    tensors = [f"model.layers.1.{name}" for name in (*TENSORS, "mlp.gate.weight")]
    text = text_of(mask, "peft")
    assert '"target_modules": []' in text and all(f'"{name}"' in text for name in tensors)
    assert "lora_target_parameters:\n  - model.layers.1.mlp" in text_of(mask, "axolotl")
    with pytest.raises(ValueError, match=r"llamafactory.*gate"):
        text_of(mask, "llamafactory")


def test_a_dense_model_has_nothing_outside(tiny):
    model = tiny.attached(tiny.config())
    assert record_of_tensors(masked_layers(model, "default")) == {}
    report = ila.apply_mask(model, tiny.mask(model, lambda at, name: at == 0))
    assert report.outside.parameters == 0 and str(report).endswith("layers open")
    assert "outside_parameters" not in Adapter(model).counts()
    model = tiny.attached(tiny.config(modules_to_save=["lm_head"]))
    report = ila.apply_mask(model, tiny.mask(model, lambda at, name: at == 0))
    assert report.outside.kinds == ("lm_head",)
    assert "parameters are trained whatever a mask closes" in str(report)

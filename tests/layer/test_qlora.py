"""Over 4-bit and int8 bases training is PEFT's QLoRA, in less memory; a closed layer is the base's.

Every model here is loaded by transformers, which has bitsandbytes pack it.
"""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

import ila
from ila_kernels.testing import assert_within_rounding

bnb = pytest.importorskip("bitsandbytes")
from peft.tuners.lora import bnb as peft_bnb  # noqa: E402

KINDS = ("nf4", "nf4-double", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a float32 Llama of sizes that bitsandbytes rewrites for AVX512, see below."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        use_cache=False,
        attention_bias=True,
    )
    path = tmp_path_factory.mktemp("packed") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def load(folder):
    """Return a loader of packed models in training mode."""

    def load(kind: str, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None):
        if kind == "int8":
            how = BitsAndBytesConfig(load_in_8bit=True)
        else:
            how = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=kind == "nf4-double",
                bnb_4bit_compute_dtype=compute or dtype,
            )
        options = {"quantization_config": how, "dtype": dtype, "device_map": {"": "cpu"}}
        return AutoModelForCausalLM.from_pretrained(folder, **options).train()

    return load


def config_of(**changes) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**options | {"init_lora_weights": False} | changes)


@pytest.fixture
def pair(tiny, load):
    """Return a maker of PEFT's model and ours over the same packed weights."""

    def make(kind: str, *dtypes, maker: str = "attached", **changes):
        config = config_of(**changes)
        plain = tiny.plain(config, load(kind, *dtypes))
        ours = getattr(tiny, maker)(config, load(kind, *dtypes))
        assert set(ila.explain(ours).paths()) == {"eager"}
        assert all("W is packed" in row.why for row in ila.explain(ours))
        return plain, ours

    return make


def unpacked(plain: PeftModel) -> PeftModel:
    """PEFT's model in fp64 with the numbers that the packed weights stand for."""
    from peft import get_peft_model

    config = copy.deepcopy(plain.peft_config["default"])
    base = plain.get_base_model().config
    base = copy.deepcopy(base)
    del base.quantization_config
    dense = get_peft_model(LlamaForCausalLM(base).double(), config, autocast_adapter_dtype=False)
    theirs = dict(plain.named_modules())
    state = {}
    for name, module in dense.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            source = theirs[name]
            if key == "weight" and isinstance(source, bnb.nn.Linear4bit):
                value = bnb.functional.dequantize_4bit(
                    source.weight.data, source.weight.quant_state
                )
            elif key == "weight" and isinstance(source, bnb.nn.Linear8bitLt):
                scale = source.weight.SCB if source.state.SCB is None else source.state.SCB
                value = source.weight.data.double() * scale.double()[:, None] / 127
            else:
                value = source.get_parameter(key)
            state[f"{name}.{key}"] = value.detach().double()
            assert value.shape == parameter.shape
    dense.load_state_dict(state)
    return dense.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maker", ["attached", "converted"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_peft(pair, tiny, kind, maker, dtype):
    plain, ours = pair(kind, dtype, maker=maker)
    exact = tiny.run(unpacked(plain))
    theirs, actual = tiny.run(plain), tiny.run(ours)
    assert set(actual) == set(theirs) == set(exact) and len(actual) == 29
    for name, value in actual.items():
        assert value.dtype == theirs[name].dtype, name
        # An fp32 adapter over a bf16 base: its gradient is a result of bf16.
        assert_within_rounding(value, exact[name], theirs[name].to(dtype), name)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_the_compute_dtype_is_that_of_the_base_not_of_x(pair, tiny, compute):
    """float32 outside and bf16 in the products, as after ``prepare_model_for_kbit_training``."""
    plain, ours = pair("nf4", torch.float32, compute)
    exact, theirs, actual = tiny.run(unpacked(plain)), tiny.run(plain), tiny.run(ours)
    for name, value in actual.items():
        assert_within_rounding(value, exact[name], theirs[name], name)
    error = (actual["logits"].double() - exact["logits"]).abs().max() / exact["logits"].abs().max()
    assert (error > 1e-4) == (compute == torch.bfloat16)


def training(model: nn.Module, steps: int, lr: float = 5e-3) -> list[float]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    batches = torch.randint(64, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(steps):
        ids = batches[step % 2]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_the_losses_of_thirty_steps_are_those_of_peft(pair, kind):
    plain, ours = pair(kind, init_lora_weights=True)
    expected, actual = training(plain, 30), training(ours, 30)
    assert actual == pytest.approx(expected, rel=1e-5, abs=0)
    assert expected[-1] < expected[0] - 0.1


class Kept:
    """Bytes that live from forward to backward: saved tensors, and what bitsandbytes hides."""

    def __init__(self, model: nn.Module):
        own = [*model.parameters(), *model.buffers()]
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.found: dict[int, int] = {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self, model: nn.Module) -> int:
        ids = torch.arange(64).view(2, 32)
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda t: t):
            loss = model(input_ids=ids, labels=ids).loss
        gc.collect()
        nodes, seen = [loss.grad_fn], set()
        while nodes:  # bitsandbytes keeps x of int8 layers as attributes of its nodes
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            hidden = [getattr(node, "A", None), *(getattr(node, "tensors", None) or ())]
            for tensor in hidden:
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor)
        return sum(self.found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_less_is_kept_for_backward_than_by_peft(pair, kind):
    """bf16 base and float32 adapters, PEFT's default: it keeps a float32 copy of every x."""
    plain, ours = pair(kind, torch.bfloat16)
    theirs, mine = Kept(plain).bytes(plain), Kept(ours).bytes(ours)
    rows, hidden, wide = 64, 64, 128
    # Of the two blocks each: q, k and v read one x, gate and up another; o and down have their own.
    assert theirs - mine >= 2 * rows * (4 * (3 * hidden + hidden + 2 * hidden + wide)) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_layer_is_the_base_layer_bit_for_bit(pair, tiny, load, kind):
    _, ours = pair(kind, init_lora_weights=True)  # B = 0 in the one layer that a mask must leave
    ila.apply_mask(ours, mask_closing(ours, lambda name: "1.mlp.down" not in name))
    base = load(kind)
    ids = tiny.tokens()
    for mode in (True, False):
        ours.train(mode)
        # In evaluation int8 layers quantise x; 4-bit ones would be rewritten, see below.
        base.train(mode or kind != "int8")
        with torch.no_grad():
            assert ours(input_ids=ids).logits.equal(base(input_ids=ids).logits)
    assert sum(p.requires_grad for p in ours.parameters()) == 2
    assert ila.explain(ours).paths() == {"bare": 13, "eager": 1}
    assert "bitsandbytes' Linear" in next(row.why for row in ila.explain(ours) if row.open)


def masked(model: nn.Module) -> dict[str, nn.Module]:
    from ila.models.layer import MaskedLoraLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, MaskedLoraLayer)}


def mask_closing(model: nn.Module, closed) -> ila.LayerMask:
    names = list(masked(model))
    return ila.LayerMask(dict.fromkeys(names, 1.0), {name: not closed(name) for name in names})


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mask_leaves_is_saved_and_loads_in_plain_peft(pair, tiny, load, tmp_path, kind):
    _, ours = pair(kind)
    ila.apply_mask(ours, mask_closing(ours, lambda name: "mlp" in name))
    training(ours, 2)
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(kind), tmp_path).train()
    kinds = (peft_bnb.Linear4bit, peft_bnb.Linear8bitLt)
    assert sum(type(m) in kinds for m in plain.modules()) == 8
    ids = tiny.tokens()
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        assert (plain(input_ids=ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    ila.convert(plain)
    assert len(masked(plain)) == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding errors")
def test_merging_disabling_and_several_adapters_are_those_of_peft(pair, tiny, kind):
    plain, ours = pair(kind)
    for model in (plain, ours):
        torch.manual_seed(5)
        model.add_adapter("second", config_of(r=2))
    results = []
    for model in (plain, ours):
        found = {}
        with model.disable_adapter():
            found["disabled"] = tiny.run(model)["logits"]
        model.set_adapter("second")
        found["second"] = tiny.run(model)["logits"]
        model.base_model.set_adapter(["default", "second"])
        found["both"] = tiny.run(model)["logits"]
        model.set_adapter("default")
        model.merge_adapter()
        found |= {n: p.detach().clone() for n, p in model.named_parameters() if "base" in n}
        found["merged"] = tiny.run(model)["logits"]
        model.unmerge_adapter()
        found["unmerged"] = tiny.run(model)["logits"]
        results.append(found)
    theirs, mine = results
    for name, value in theirs.items():
        if value.is_floating_point():
            # 1e-6: sums in another order, in fp32, through two blocks.
            assert (mine[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
        else:
            assert mine[name].equal(value), name  # the packed bytes after merging
    assert (theirs["merged"] - theirs["disabled"]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_restore_gives_back_the_very_model_of_peft(tiny, load, kind):
    plain = tiny.plain(config_of(), load(kind))
    before = tiny.snapshot(plain)
    ila.convert(plain)
    assert tiny.snapshot(plain) != before
    ila.restore(plain)
    assert tiny.snapshot(plain) == before


def test_a_variant_takes_the_path_of_peft(tiny, load):
    model = tiny.attached(config_of(use_dora=True), load("nf4"))
    assert {row.why for row in ila.explain(model)} == {"LoRA variant Dora"}
    assert torch.isfinite(tiny.run(model)["logits"]).all()


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("kind", ["nf4-double"])
def test_an_evaluation_between_steps_changes_nothing(pair, tiny, kind, closed):
    """bitsandbytes rewrites 4-bit weights for inference on CPUs with AVX512-BF16, for good.

    A step of PEFT's layers after that has no gradient with respect to x.
    """
    _, ours = pair(kind)
    if closed:
        ila.apply_mask(ours, mask_closing(ours, lambda name: "layers.1" in name))
    before = tiny.run(ours)
    with torch.no_grad():
        ours.eval()(input_ids=tiny.tokens())
    tiny.assert_equal(tiny.run(ours.train()), before)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_an_evaluation_leaves_layers_without_an_adapter_trainable_too(tiny, load, kind):
    """They are bitsandbytes' own, and the gradient passes them."""
    model = tiny.attached(config_of(target_modules=["q_proj"]), load(kind))
    before = tiny.run(model)
    with torch.no_grad():
        model.eval()(input_ids=tiny.tokens())
    tiny.assert_equal(tiny.run(model.train()), before)
    assert len(before) == 5 and all(value.abs().max() > 0 for value in before.values())


def test_a_model_that_was_evaluated_first_can_still_be_trained(tiny, load):
    base, fresh = load("nf4"), tiny.attached(config_of(), load("nf4"))
    with torch.no_grad():
        base.eval()(input_ids=tiny.tokens())
    model = tiny.attached(config_of(), base.train())
    for layer, other in zip(masked(model).values(), masked(fresh).values(), strict=True):
        one, two = (m.base_layer.weight for m in (layer, other))
        assert one.equal(two)
        one, two = (bnb.functional.dequantize_4bit(w.data, w.quant_state) for w in (one, two))
        # bitsandbytes rounded the scales of the blocks to bf16 on such a CPU.
        assert ((one - two).abs() <= torch.finfo(torch.bfloat16).eps * two.abs()).all()
    assert all(gradient.abs().max() > 0 for gradient in tiny.run(model).values())


def test_int8_weights_that_are_trained_are_left_to_peft(tiny):
    base = nn.Sequential(bnb.nn.Linear8bitLt(32, 32, has_fp16_weights=True))
    base.is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="4-bit or int8 layer of bitsandbytes"):
        ila.attach(base, LoraConfig(target_modules=["0"]))


def test_dropout_is_drawn_over_a_packed_base_too(tiny, load):
    model = tiny.attached(config_of(lora_dropout=0.5), load("nf4"))
    first, second = tiny.run(model)["logits"], tiny.run(model)["logits"]
    assert not first.equal(second)
    assert set(ila.explain(model).paths()) == {"eager"}
    model.eval()
    assert tiny.run(model)["logits"].equal(tiny.run(model)["logits"])

"""A whole training step under torch.compile: the numbers of the eager step, one graph a mask."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import ila
from ila.masks.mask import LayerMask
from ila.models.edit import masked_layers
from ila.models.loading import find_source, load_model
from ila.search import stage2

STEPS = 3


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not breaks, breaks
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def make_model():
    """One block in fp64, A and B random: the compiler's time grows with the blocks."""
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    lora = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(5)
    return ila.attach(
        LlamaForCausalLM(config).double(), lora, autocast_adapter_dtype=False
    ).double()


def train_steps(model, parameters):
    """Loss of each of a few steps of forward, loss, backward and AdamW; then what was trained."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = torch.arange(14).mul(5).remainder(24).view(2, 7)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in parameters)]


def check_same_steps(compiled, model, twin, tolerance=1e-11):
    """The compiled model against an eager twin, which runs the same operations."""
    found, expected = (
        train_steps(callee, [p for p in owner.parameters() if p.requires_grad])
        for callee, owner in ((compiled, model), (twin, twin))
    )
    assert len(found) > STEPS
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def half_open(model) -> LayerMask:
    names = list(masked_layers(model, "default"))
    return LayerMask(dict.fromkeys(names, 0.0), {n: i % 2 == 1 for i, n in enumerate(names)})


def test_a_compiled_step_is_the_eager_step_and_a_mask_compiles_once():
    model = make_model()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    check_same_steps(compiled, model, twin)
    assert graphs() == 1
    for each in (model, twin):
        ila.apply_mask(each, half_open(each))
    check_same_steps(compiled, model, twin)
    assert graphs() == 2
    for each in (model, twin):  # all open again: the first graph is still there
        names = masked_layers(each, "default")
        ila.apply_mask(each, LayerMask(dict.fromkeys(names, 0.0)))
    check_same_steps(compiled, model, twin)
    assert graphs() == 2


def test_a_compiled_step_of_the_scores_is_the_eager_step():
    model = make_model()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    own, others = (masked_layers(each, "default") for each in (model, twin))
    with stage2.scored(model, own, "default", 2.0), stage2.scored(twin, others, "default", 2.0):
        check_same_steps(compiled, model, twin)
        with torch.no_grad():  # as the path method does between steps
            for layer in (*own.values(), *others.values()):
                layer.lora_S["default"].fill_(-1.0)
        check_same_steps(compiled, model, twin)
        assert graphs() == 1


# Said by the compiler to itself, of the ctx that it makes for any autograd function.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_compiled_step_over_a_packed_base_is_the_eager_step(load_in, tiny_model_folder):
    pytest.importorskip("bitsandbytes")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    pair = []
    for _ in range(2):
        torch.manual_seed(5)
        base = load_model(find_source(str(tiny_model_folder)), load_in=load_in).train()
        pair.append(ila.attach(base, lora))
    model, twin = pair
    for each in pair:
        ila.apply_mask(each, half_open(each))
    # The same operations, in fp32: the norms, the softmax and the loss stay torch's own.
    check_same_steps(torch.compile(model, backend="aot_eager"), model, twin, tolerance=2**-20)
    # bitsandbytes moves int8 codes from the weight to the layer in the first forward: one more.
    assert graphs() == (1 if load_in == "4bit" else 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_inductor_compiles_the_step_of_a_masked_model():
    model = make_model()
    ila.apply_mask(model, half_open(model))
    compiled = torch.compile(model, backend="inductor")
    # Llama's norms, softmax and loss are fp32 inside whatever the dtype, and inductor adds up in
    # another order: a few dozen roundings of 6e-8.
    check_same_steps(compiled, model, copy.deepcopy(model), tolerance=64 * 2**-24)
    assert graphs() == 1


def test_trainer_compiles_every_stage():
    # Rows of one length: another length is another graph, once, and then one for all lengths.
    rows = [
        {"input_ids": [3, 4 + i, 5, 6 + i], "labels": [-100, 4 + i, 5, 6 + i]} for i in range(4)
    ]

    def losses(training_args):
        model = make_model()
        config = ila.SearchConfig(
            stage1_steps=2,
            stage2_steps=5,
            batch_size=2,
            save_every=None,
            training_args=training_args | {"use_cpu": True},
        )
        mask = ila.learn_mask(model, rows, config, progress=False)
        return [*mask.scores.values(), mask.provenance["stage1"]["last_window_loss"]]

    eager = losses({})
    found = losses({"torch_compile": True, "torch_compile_backend": "aot_eager"})
    assert graphs() == 2  # one for each stage
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-11)

import dataclasses

import pytest
import torch

from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.testing import Inputs, make_inputs, values_and_grads

FP64 = torch.float64


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def linear(i: Inputs, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    return masked_lora_linear(
        i.x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, scale=1.7,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


def group(i: Inputs, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    seeds = None if seed is None else seed + torch.arange(3)
    ys = masked_lora_linear_group(
        i.x,
        [i.weight, i.weight * 2, i.weight * 3],
        [i.lora_a, None, i.lora_a[:1]],
        [i.lora_b, None, i.lora_b[:, :1]],
        [i.gate, None, None],
        biases=[i.bias, None, i.bias],
        scales=[1.7, 1.0, 0.5],
        dropout_p=dropout_p,
        seed=seeds,
    )
    return ys[0] + ys[1].cos() + ys[2].sin()


def assert_compiled_equals_eager(compiled, function, inputs, dropout_p):
    seed = torch.tensor([3]) if dropout_p else None
    actual = values_and_grads(lambda i: compiled(i, dropout_p, seed), inputs)
    expected = values_and_grads(lambda i: function(i, dropout_p, seed), inputs)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11)


def by_tensors(function, backend):
    """Compile ``function`` of an Inputs as a function of plain tensors."""

    def plain(x, weight, lora_a, lora_b, gate, bias, dropout_p, seed):
        inputs = Inputs(x, weight, lora_a, lora_b, gate, bias, x)
        return function(inputs, dropout_p, seed)

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend=backend)
    return lambda i, dropout_p, seed: compiled(
        i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, dropout_p, seed
    )


@pytest.mark.parametrize("function", [linear, group])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("gate", [None, 0.5])
def test_full_graph_with_dynamic_shapes(function, dropout_p, gate):
    compiled = by_tensors(function, "aot_eager")
    for m in (5, 37, 101):
        inputs = make_inputs(m, 7, 6, 3, dtype=FP64, gate=gate, bias=True)
        assert_compiled_equals_eager(compiled, function, inputs, dropout_p)


def test_number_of_tokens_does_not_recompile():
    compiled = by_tensors(linear, "aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for m in (70, 80, 101, 333):
        inputs = make_inputs(m, 7, 6, 3, dtype=FP64, gate=0.5, bias=True)
        assert_compiled_equals_eager(compiled, linear, inputs, 0.0)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("requires", [("gate",), ("x",), ("x", "gate"), ("lora_a", "lora_b"), ()])
@pytest.mark.parametrize("function", [linear, group])
def test_only_what_is_wanted_gets_a_gradient(function, requires):
    inputs = make_inputs(5, 7, 6, 3, dtype=FP64, gate=0.5, bias=True, requires=requires)
    assert_compiled_equals_eager(by_tensors(function, "aot_eager"), function, inputs, 0.3)


@pytest.mark.parametrize("function", [linear, group])
def test_leading_dimensions_compile(function):
    inputs = make_inputs(6, 7, 6, 3, dtype=FP64, gate=0.5, bias=True)
    x = inputs.x.detach().view(2, 3, 7).requires_grad_()
    inputs = dataclasses.replace(inputs, x=x, dy=inputs.dy.view(2, 3, 6))
    assert_compiled_equals_eager(by_tensors(function, "aot_eager"), function, inputs, 0.3)


def test_each_compiled_call_draws_its_own_mask():
    inputs = make_inputs(37, 7, 6, 3, dtype=FP64, requires=())
    compiled = by_tensors(linear, "aot_eager")
    assert not torch.equal(compiled(inputs, 0.5, None), compiled(inputs, 0.5, None))


def test_autocast_compiles():
    inputs = make_inputs(101, 7, 6, 3, dtype=torch.float32, gate=0.5, bias=True)
    compiled = by_tensors(linear, "aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(inputs, 0.0, None), linear(inputs, 0.0, None)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


# Inductor for CPUs imports mkldnn modules that are still script methods.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_inductor_compiles_a_group_with_what_surrounds_it():
    inputs = make_inputs(37, 7, 6, 3, dtype=FP64, gate=0.5, bias=True)
    assert_compiled_equals_eager(by_tensors(group, "inductor"), group, inputs, 0.3)

"""impl="hybrid" against the reference in fp64 and against impl="triton", whose masks it shares."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from ila_kernels.testing import Inputs, assert_within_rounding, make_inputs, values_and_grads
from tests.kernels import calls

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIGMOID = 1 / (1 + math.exp(-0.3))
ODD = (37, 48, 40, 4)
LORA = ("x", "lora_a", "lora_b")
ALL = (*LORA, "weight", "gate", "bias")


linear, group = (partial(f, impl="hybrid") for f in (calls.linear, calls.group))
BOTH = pytest.mark.parametrize("function", [linear, group], ids=["linear", "group"])


@BOTH
@pytest.mark.parametrize(
    ("shape", "dtype", "adapter_dtype", "gate", "bias"),
    [
        (ODD, BF16, FP32, None, False),  # what PEFT makes by default
        (ODD, BF16, FP32, SIGMOID, True),
        (ODD, FP16, FP16, None, True),
        (ODD, FP32, FP32, SIGMOID, False),
        ((130, 33, 70, 18), BF16, BF16, None, True),  # R above one block, nothing a multiple of 8
        ((1, 1, 1, 2), BF16, FP32, SIGMOID, True),
        (ODD, BF16, FP32, 0.0, False),  # closed by data
    ],
)
def test_values_and_gradients_are_within_rounding(
    function, shape, dtype, adapter_dtype, gate, bias
):
    i = make_inputs(
        *shape, dtype=dtype, adapter_dtype=adapter_dtype, gate=gate, bias=bias, device="cuda"
    )
    actual = values_and_grads(function, i)
    expected, eager = (
        values_and_grads(lambda i: function(i, impl="reference"), i.cast(d))
        for d in (torch.float64, dtype)
    )
    for name, value in actual.items():
        own = i.x if name == "y" else i.wanted()[name[1:]]
        assert value.dtype == own.dtype, name
        assert_within_rounding(value, expected[name], eager[name], name)


@BOTH
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_dropout_draws_the_masks_of_the_fused_kernels(function, dtype):
    """Without rounding both are the same function of the seed."""
    i = make_inputs(*ODD, dtype=dtype, adapter_dtype=FP32, gate=0.5, bias=True, device="cuda")

    def run(impl: str, i: Inputs) -> dict[str, Tensor]:
        torch.manual_seed(7)  # from which the seeds of dropout are drawn
        return values_and_grads(lambda i: function(i, 0.3, impl=impl), i)

    ours, fused = run("hybrid", i), run("triton", i)
    # The fused kernels in fp32 stand for the exact result: the masks are equal or they are not.
    wide = run("triton", i.cast(FP32))
    for name, value in ours.items():
        assert_within_rounding(value, wide[name].double(), fused[name], name)


@BOTH
@pytest.mark.parametrize("requires", [("gate",), ("x",), LORA])
def test_only_what_is_wanted_gets_a_gradient(function, requires):
    i = make_inputs(*ODD, dtype=FP32, gate=0.5, device="cuda", requires=requires)
    function(i).backward(i.dy)
    assert {n for n, t in i.wanted().items() if t.grad is not None} == set(requires)


def test_no_rows_are_no_error():
    i = make_inputs(0, 48, 40, 4, dtype=BF16, gate=0.5, device="cuda")
    y = linear(i, 0.3)
    y.backward(i.dy)
    assert y.shape == (0, 40) and not i.lora_b.grad.any()


def test_the_op_keeps_its_contract(plain_tensors):
    i = make_inputs(20, 24, 20, 3, dtype=FP32, gate=0.5, bias=True, device="cuda", requires=ALL)
    arguments = (i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, None, 1.7, 0.0, "hybrid")
    results = opcheck(torch.ops.ila.masked_lora_linear.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@BOTH
def test_full_graph_with_dynamic_shapes(plain_tensors, function):
    def by_tensors(x, weight, lora_a, lora_b, gate, bias):
        return function(Inputs(x, weight, lora_a, lora_b, gate, bias, x), 0.3)

    def compiled(i):
        return graph(i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias)

    graph = torch.compile(by_tensors, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 37):
        i = make_inputs(m, 24, 20, 3, dtype=FP32, gate=0.5, bias=True, device="cuda", requires=ALL)
        results = []
        for run in (lambda i: function(i, 0.3), compiled):
            torch.manual_seed(7)
            results.append(values_and_grads(run, i))
        expected, actual = results
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (m, name)

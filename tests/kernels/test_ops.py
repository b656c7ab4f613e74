import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.group_ops import absent
from ila_kernels.testing import make_inputs, values_and_grads

OPS = torch.ops.ila
ALL_FOUR = {
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
}
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def assert_passes_all_four(op, arguments, **options):
    assert opcheck(op, arguments, **options) == dict.fromkeys(ALL_FOUR, "SUCCESS")


def linear_arguments(m, dtype, adapter_dtype, gate, bias, dropout_p, requires):
    i = make_inputs(
        m,
        7,
        6,
        3,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        gate=gate,
        bias=bias,
        requires=requires,
    )
    seed = torch.tensor([5]) if dropout_p else None
    return i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, seed, 1.7, dropout_p


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "dtype", "adapter_dtype", "gate", "bias", "requires"),
    [
        (5, FP64, FP64, 0.5, True, ("x", "weight", "lora_a", "lora_b", "gate", "bias")),
        (5, FP32, FP32, None, False, ("x", "lora_a", "lora_b")),  # LoRA training
        (5, FP32, FP32, 0.5, True, ("x", "gate")),  # the mask search
        (70, BF16, FP32, 0.5, False, ("x", "lora_a", "lora_b", "gate")),  # mixed dtypes
        (5, BF16, FP32, None, False, ("lora_a", "lora_b")),  # few rows: t is fp32
        (0, FP32, FP32, 0.5, False, ("x", "lora_a")),  # no tokens
    ],
)
def test_linear_op_keeps_its_contract(m, dtype, adapter_dtype, gate, bias, requires, dropout_p):
    arguments = linear_arguments(m, dtype, adapter_dtype, gate, bias, dropout_p, requires)
    # opcheck compares compiled gradients with eager ones; bf16 needs a tolerance of its own eps.
    options = {"rtol": 2 * torch.finfo(BF16).eps, "atol": 0.05} if dtype == BF16 else {}
    assert_passes_all_four(OPS.masked_lora_linear.default, arguments, **options)


def group_arguments(dropout_p, open_members=(True, True), dtype=FP64, gates=(0.5, None)):
    rows = [
        make_inputs(5, 7, n, r, dtype=dtype, gate=gate, bias=bias, seed=n)
        for n, r, gate, bias in ((6, 3, gates[0], False), (4, 2, gates[1], True))
    ]
    x, none = rows[0].x, absent(rows[0].x.detach())

    def column(name, only_open=False) -> list[Tensor]:
        tensors = [getattr(row, name) for row in rows]
        kept = [o or not only_open for o in open_members]
        return [t if k and t is not None else none for t, k in zip(tensors, kept, strict=True)]

    return (
        x,
        column("weight"),
        column("lora_a", True),
        column("lora_b", True),
        column("gate", True),
        column("bias"),
        torch.tensor([5, 6]) if dropout_p else None,
        [1.7, 0.5],
        dropout_p,
        "eager",
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "open_members", [(True, True), (True, False), (False, True), (False, False)]
)
def test_group_op_keeps_its_contract(open_members, dropout_p):
    arguments = group_arguments(dropout_p, open_members)
    assert_passes_all_four(OPS.masked_lora_linear_group.default, arguments)


def test_group_op_keeps_its_contract_when_only_gates_learn():
    x, weights, *columns, biases, seeds, scales, p, impl = group_arguments(0.0, gates=(0.5, 0.7))
    columns[0], columns[1] = ([t.detach() for t in column] for column in columns[:2])
    weights, biases = ([t.detach() for t in column] for column in (weights, biases))
    arguments = (x.detach(), weights, *columns, biases, seeds, scales, p, impl)
    assert_passes_all_four(OPS.masked_lora_linear_group.default, arguments)


@pytest.mark.parametrize(("k", "n"), [(0, 4), (5, 0)])
def test_an_empty_adapter_is_no_absent_one(k, n):
    x, none = torch.randn(3, k), absent(torch.randn(1))
    lists = ([torch.randn(n, k)], [torch.randn(2, k)], [torch.randn(n, 2)], [none], [none])
    arguments = (x, *lists, None, [1.0], 0.0, "eager")
    y, t = OPS.masked_lora_linear_group(*arguments)
    assert y.shape == (3, n)
    assert t.shape == (3, 2)
    opcheck(OPS.masked_lora_linear_group.default, arguments, test_utils="test_faketensor")


def test_keep_mask_op_keeps_its_contract():
    arguments = (torch.tensor([5]), 6, 7, 0.3, torch.device("cpu"))
    assert_passes_all_four(OPS.keep_mask.default, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_op_and_function_compute_the_same(dropout_p):
    # torch.compile sees the op; everybody else runs the function.
    inputs = make_inputs(101, 48, 40, 4, dtype=BF16, adapter_dtype=FP32, gate=0.5, bias=True)
    seed = torch.tensor([5]) if dropout_p else None

    def op(i):
        arguments = (i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, seed, 1.7, dropout_p)
        return OPS.masked_lora_linear(*arguments)[0]

    def function(i):
        return masked_lora_linear(
            i.x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, scale=1.7,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip

    by_op, by_function = values_and_grads(op, inputs), values_and_grads(function, inputs)
    for name in by_function:
        assert torch.equal(by_op[name], by_function[name]), name


def test_ops_refuse_second_derivatives():
    x, *rest = linear_arguments(5, FP64, FP64, 0.5, False, 0.0, ("x", "lora_a"))
    y, _ = OPS.masked_lora_linear(x, *rest)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    x, *rest = group_arguments(0.0)
    y = OPS.masked_lora_linear_group(x, *rest)[0]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fake_tensors_pass_through_both_functions(dropout_p):
    # Nothing reads a value, the gate's included; memory planners count on this.
    with FakeTensorMode():
        i = make_inputs(101, 48, 40, 4, dtype=FP32, gate=0.5, bias=True)
        y = masked_lora_linear(
            i.x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, dropout_p=dropout_p
        )
        ys = masked_lora_linear_group(
            i.x, [i.weight] * 2, [i.lora_a, None], [i.lora_b, None], [i.gate, None],
            dropout_p=dropout_p,
        )  # fmt: skip
        (y + sum(ys)).backward(i.dy)
        assert y.shape == (101, 40)
        assert i.gate.grad.shape == (1,)

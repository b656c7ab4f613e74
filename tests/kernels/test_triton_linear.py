"""The op with impl="triton" against the reference in fp64, on a GPU or emulated on a CPU."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from ila_kernels import masked_lora_linear, masked_lora_linear_group, reference
from ila_kernels.dropout import draw_seed
from ila_kernels.testing import (
    NAMES,
    Inputs,
    assert_within_rounding,
    make_inputs,
    values_and_grads,
)

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIGMOID = 1 / (1 + math.exp(-0.3))
ODD = (37, 48, 40, 4)


def ours(i: Inputs, **options) -> Tensor:
    torch.manual_seed(7)  # what a seed of dropout is drawn from
    return masked_lora_linear(
        i.x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, impl="triton", **options
    )


def keep_of(m: int, k: int, p: float) -> Tensor:
    """The mask that ``ours`` draws, read off t: with x = 1 and A = 1 it is t (1 − p)."""
    from ila_kernels.kernels.shrink import shrink

    torch.manual_seed(7)
    seed = int(draw_seed())
    x, a = torch.ones(m, k, device="cuda"), torch.eye(k, device="cuda")
    return shrink(x, [a], [seed], p)[0] != 0


def assert_matches(inputs: Inputs, scale=2.0, dropout_p=0.0) -> dict[str, Tensor]:
    """Like testing.assert_matches_reference, with the mask that the kernels draw."""
    keep = keep_of(*inputs.x.shape, dropout_p) if dropout_p and inputs.x.numel() else None

    def run_reference(i):
        return reference.masked_lora_linear(
            i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, scale, keep, dropout_p
        )

    run = values_and_grads(lambda i: ours(i, scale=scale, dropout_p=dropout_p), inputs)
    exact = values_and_grads(run_reference, inputs.cast(torch.float64))
    plain = values_and_grads(run_reference, inputs.cast(inputs.x.dtype))
    for name, value in run.items():
        own = inputs.x if name == "y" else inputs.wanted()[name[1:]]
        assert value.dtype == own.dtype, name
        narrower = torch.finfo(own.dtype).eps > torch.finfo(plain[name].dtype).eps
        peer = plain[name].to(own.dtype) if narrower else plain[name]
        assert_within_rounding(value, exact[name], peer, name)
    return run


def relaid(inputs: Inputs, layout: str) -> Inputs:
    """The same values behind other strides; what lies between them is NaN, never to be read."""
    x, dy = inputs.x.detach(), inputs.dy
    m, k = x.shape
    if layout == "strided":
        x = x.new_full((m, 2 * k), math.nan)[:, ::2].copy_(x)
    elif layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "offset":
        x = x.new_full((m + 1, k + 3), math.nan)[1:, 3:].copy_(x)
    elif layout == "dy strided":
        dy = dy.new_full((m, 2 * dy.shape[1]), math.nan)[:, ::2].copy_(dy)
    elif layout == "dy expanded":
        dy = dy[:1].expand_as(dy)
    x = x.detach().requires_grad_(inputs.x.requires_grad)
    return dataclasses.replace(inputs, x=x, dy=dy)


GRID = [
    # why, (M, K, N, R), dtype, adapter dtype, gate, dropout, bias, layout
    ("smallest: every size 1", (1, 1, 1, 1), BF16, BF16, SIGMOID, 0.0, True, None),
    ("what PEFT makes by default", ODD, BF16, FP32, None, 0.0, False, None),
    ("the same with its usual dropout", ODD, BF16, FP32, None, 0.05, False, None),
    ("everything at once", ODD, BF16, FP32, SIGMOID, 0.3, True, None),
    ("everything at once, fp16", ODD, FP16, FP16, SIGMOID, 0.3, True, None),
    ("everything at once, fp32", ODD, FP32, FP32, SIGMOID, 0.3, True, None),
    ("adapters narrower than x", ODD, FP32, BF16, SIGMOID, 0.0, True, None),
    ("half dtypes that do not mix", ODD, BF16, FP16, SIGMOID, 0.0, True, None),
    ("closed by data: the loop over R is empty", ODD, BF16, FP32, 0.0, 0.3, True, None),
    ("negative γ: a search may cross 0", ODD, BF16, FP32, -0.5, 0.0, False, None),
    ("no tokens", (0, 48, 40, 4), BF16, FP32, SIGMOID, 0.3, True, None),
    ("no out-features", (5, 48, 0, 4), FP32, FP32, SIGMOID, 0.0, True, None),
    ("no in-features", (5, 0, 40, 4), FP32, FP32, SIGMOID, 0.0, True, None),
    ("rank 70: a last step not full", (37, 48, 40, 70), BF16, FP32, SIGMOID, 0.3, True, None),
    ("rank 300 in fp32: a sum of its own", (7, 40, 33, 300), FP32, FP32, SIGMOID, 0.0, True, None),
    ("rank 512 in fp32, no gate", (7, 40, 33, 512), FP32, FP32, None, 0.0, False, None),
    ("rank 256", (20, 24, 36, 256), BF16, BF16, None, 0.0, False, None),
    ("several tiles each way, none full", (150, 140, 133, 8), BF16, FP32, SIGMOID, 0.3, True, None),
    ("tile multiples: no masked K step", (128, 128, 256, 16), FP16, FP16, None, 0.0, False, None),
    ("M beyond one program's stretch", (1100, 20, 24, 3), BF16, FP32, SIGMOID, 0.3, False, None),
    ("x is every second column of a buffer", ODD, BF16, FP32, SIGMOID, 0.3, True, "strided"),
    ("x is a transpose", ODD, BF16, FP32, None, 0.0, False, "transposed"),
    ("x starts inside a wider buffer", ODD, FP32, FP32, SIGMOID, 0.3, True, "offset"),
    ("dy is every second column", ODD, BF16, FP32, SIGMOID, 0.0, True, "dy strided"),
    ("dy repeats one row, as after a sum", ODD, FP32, FP32, None, 0.0, True, "dy expanded"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype", "adapter_dtype", "gate", "dropout_p", "bias", "layout"),
    [row[1:] for row in GRID],
    ids=[row[0] for row in GRID],
)
def test_values_and_gradients_are_within_rounding(
    shape, dtype, adapter_dtype, gate, dropout_p, bias, layout
):
    inputs = make_inputs(
        *shape, dtype=dtype, adapter_dtype=adapter_dtype, gate=gate, bias=bias, device="cuda"
    )
    if layout is not None:
        inputs = relaid(inputs, layout)
    assert_matches(inputs, dropout_p=dropout_p)


@given(
    shape=st.tuples(
        st.integers(0, 90), st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 3, 8, 17])
    ),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    adapter_dtype=st.sampled_from([BF16, FP16, FP32]),
    gate=st.sampled_from([None, 0.0, 1.0, SIGMOID, -2.0]),
    scale=st.sampled_from([1.0, 2.0, 0.3]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.3]),
    bias=st.booleans(),
    requires=st.sets(st.sampled_from(NAMES)),
    layout=st.sampled_from(["plain", "strided", "transposed", "offset", "dy strided"]),
    seed=st.integers(0, 2**31),
)
def test_any_call_is_within_rounding(
    shape, dtype, adapter_dtype, gate, scale, dropout_p, bias, requires, layout, seed
):
    inputs = make_inputs(
        *shape,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        gate=gate,
        bias=bias,
        requires=requires,
        seed=seed,
        device="cuda",
    )
    assert_matches(relaid(inputs, layout), scale=scale, dropout_p=dropout_p)


# --- laws


def test_gate_zero_equals_the_kernel_without_the_low_rank_part():
    from ila_kernels.device import target_of
    from ila_kernels.kernels import lowrank_gemm

    i = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.0, bias=True, device="cuda")
    y = ours(i, scale=2.0).detach()
    bare = torch.empty(ODD[0], ODD[2], dtype=BF16, device="cuda")
    x, q = i.x.detach(), i.weight.detach().t()
    bias = i.bias.detach()
    lowrank_gemm.launch(x, q, None, None, bare, 1.0, None, bias, None, 0.0, target_of(x)).run()
    assert torch.equal(y, bare)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_two_runs_give_the_same_bits(dropout_p):
    shape = (1100, 20, 24, 3)  # sums over several programs
    i = make_inputs(*shape, dtype=BF16, adapter_dtype=FP32, gate=0.5, bias=True, device="cuda")
    first, second = (values_and_grads(lambda i: ours(i, dropout_p=dropout_p), i) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_changes_nothing(plain_tensors, use_reentrant):
    i = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.5, bias=True, device="cuda")

    def run(i, x):
        arguments = (x, i.weight, i.lora_a, i.lora_b, i.gate)
        return masked_lora_linear(*arguments, dropout_p=0.3, impl="triton")

    torch.manual_seed(7)
    plain = values_and_grads(lambda i: run(i, i.x), dataclasses.replace(i, bias=None))
    again = dataclasses.replace(i.wanting(NAMES), bias=None)
    torch.manual_seed(7)
    y = checkpoint(
        lambda x: run(again, x),
        again.x,
        use_reentrant=use_reentrant,
    )
    torch.manual_seed(8)  # what runs in between draws on
    y.backward(again.dy)
    for name, tensor in again.wanted().items():
        assert torch.equal(tensor.grad, plain[f"d{name}"]), name


def test_backward_twice_gives_the_same():
    i = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.5, device="cuda")
    y = ours(i, dropout_p=0.3)
    wanted = list(i.wanted().values())
    first = torch.autograd.grad(y, wanted, i.dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, i.dy)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_group_equals_its_members():
    i = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.5, bias=True, device="cuda")
    torch.manual_seed(7)
    group = masked_lora_linear_group(
        i.x,
        [i.weight] * 3,
        [i.lora_a, None, i.lora_a],
        [i.lora_b, None, i.lora_b],
        [i.gate, None, None],
        biases=[i.bias, None, i.bias],
        scales=2.0,
        dropout_p=0.3,
        impl="triton",
    )
    # Of a group's seeds the first is the one that a single call draws.
    assert torch.equal(group[0], ours(i, scale=2.0, dropout_p=0.3))
    assert torch.equal(group[1], torch.nn.functional.linear(i.x, i.weight))
    # The third member differs by its gate and has a mask of its own.
    assert not torch.equal(
        group[2], ours(dataclasses.replace(i, gate=None), scale=2.0, dropout_p=0.3)
    )


def test_auto_takes_the_kernels_only_where_they_are_preferred(monkeypatch):
    from ila_kernels import ops, prefer

    taken, function = [], ops.MaskedLoraLinearFunction.apply
    monkeypatch.setattr(
        ops.MaskedLoraLinearFunction,
        "apply",
        lambda *inputs: taken.append(inputs[9]) or function(*inputs),
    )
    i = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.5, device="cuda")
    arguments = (i.x, i.weight, i.lora_a, i.lora_b, i.gate)
    masked_lora_linear(*arguments)
    try:
        prefer(auto="triton")
        masked_lora_linear(*arguments)
    finally:
        prefer()
    assert taken == ["eager", "triton"]


def test_fp64_is_refused():
    i = make_inputs(*ODD, dtype=torch.float64, device="cuda")
    with pytest.raises(TypeError, match="take x in bfloat16, float16 or float32, got"):
        ours(i)

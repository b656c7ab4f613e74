import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ila_kernels import masked_lora_linear, ops
from ila_kernels.testing import (
    NAMES,
    Inputs,
    assert_matches_reference,
    assert_within_rounding,
    make_inputs,
    values_and_grads,
)

SEED = torch.tensor([1234])
SIGMOID = 1 / (1 + math.exp(-0.3))


def seeded(dropout_p: float) -> Tensor | None:
    return SEED if dropout_p else None


def ours(i: Inputs, **options) -> Tensor:
    return masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, **options)


def relaid(inputs: Inputs, layout: str) -> Inputs:
    """The same values of x (of its first row where there is only one), laid out differently.

    The memory around x is no NaN: torch's own bf16 GEMM on a CPU reads one element past an odd K
    and multiplies it by 0.
    """
    x, dy = inputs.x.detach(), inputs.dy
    m, k = x.shape
    if layout == "strided":
        x = x.new_full((m, 2 * k), 777.0)[:, ::2].copy_(x)
    elif layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "offset":
        x = x.new_full((m + 1, k + 3), 777.0)[1:, 3:].copy_(x)
    elif layout == "expanded":
        x = x[:1].expand(m, k)
    elif layout == "3-D":
        x, dy = x.view(-1, m // 3, k), dy.view(-1, m // 3, dy.shape[1])
    elif layout == "3-D strided":
        x = x.view(3, m // 3, k).transpose(0, 1)
        dy = dy.view(3, m // 3, -1).transpose(0, 1)
    elif layout == "1-D":
        x, dy = x[0], dy[0]
    elif layout == "dy strided":
        dy = dy.new_full((m, 2 * dy.shape[1]), 777.0)[:, ::2].copy_(dy)
    elif layout == "dy expanded":
        dy = dy[:1].expand_as(dy)
    else:
        raise ValueError(layout)
    x = x.detach().requires_grad_(inputs.x.requires_grad)
    return dataclasses.replace(inputs, x=x, dy=dy)


# --- derivatives, against finite differences in fp64

COMBINATIONS = [
    names for count in range(1, 7) for names in itertools.combinations(NAMES, count)
]  # 2^6 - 1


def derived(i: Inputs, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """The op's own backward, even where so few rows are left to torch's autograd."""
    inputs = (i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, seed, scale, dropout_p, "eager")
    return ops.MaskedLoraLinearFunction.apply(*inputs, None, None)


@pytest.mark.parametrize("call", [ours, derived])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("absent", [(), ("gate",), ("bias",), ("gate", "bias")])
def test_gradients_are_right_for_every_combination_of_inputs(absent, dropout_p, call):
    combinations = [names for names in COMBINATIONS if not set(absent) & set(names)]
    gate, bias = None if "gate" in absent else 0.7, "bias" not in absent
    inputs = make_inputs(3, 4, 5, 2, dtype=torch.float64, gate=gate, bias=bias)
    for requires in combinations:
        i = inputs.wanting(requires)

        def function(*tensors, names=requires, i=i):
            replaced = dataclasses.replace(i, **dict(zip(names, tensors, strict=True)))
            return call(replaced, scale=1.7, dropout_p=dropout_p, seed=seeded(dropout_p))

        assert torch.autograd.gradcheck(function, tuple(i.wanted().values())), requires


# --- values and gradients in every dtype, within the rounding of that dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ODD = (37, 48, 40, 4)  # no two alike; M is prime
LONG = (101, 48, 40, 4)  # the same above SHORT_ROWS, where nothing is left to torch's autograd
GRID = [
    # why, (M, K, N, R), dtype, adapter dtype, gate, dropout, bias, layout
    ("smallest: every size 1", (1, 1, 1, 1), BF16, BF16, SIGMOID, 0.0, True, None),
    ("smallest, fp16", (1, 1, 1, 1), FP16, FP16, None, 0.0, False, None),
    ("smallest, fp32", (1, 1, 1, 1), FP32, FP32, SIGMOID, 0.0, True, None),
    ("one token: decoding", (1, 48, 40, 4), BF16, FP32, None, 0.0, False, None),
    ("what PEFT makes by default", ODD, BF16, FP32, None, 0.0, False, None),
    ("the same with its usual dropout", ODD, BF16, FP32, None, 0.05, False, None),
    ("the same as a mask search", ODD, BF16, FP32, SIGMOID, 0.0, False, None),
    ("everything at once", ODD, BF16, FP32, SIGMOID, 0.3, True, None),
    ("one dtype for all: autocast_adapter_dtype=False", ODD, BF16, BF16, SIGMOID, 0.3, True, None),
    ("fp16: narrow exponent", ODD, FP16, FP16, SIGMOID, 0.3, True, None),
    ("fp16 under fp32 adapters", ODD, FP16, FP32, SIGMOID, 0.3, True, None),
    ("fp32: nothing to hide behind", ODD, FP32, FP32, SIGMOID, 0.3, True, None),
    ("fp32, no extras", ODD, FP32, FP32, None, 0.0, False, None),
    ("adapters narrower than x", ODD, FP32, BF16, SIGMOID, 0.3, True, None),
    ("half dtypes that do not mix", ODD, BF16, FP16, SIGMOID, 0.0, True, None),
    ("fp64 adapters promote nothing", ODD, BF16, torch.float64, 1.0, 0.0, False, None),
    ("closed by data: γ = 0", ODD, BF16, FP32, 0.0, 0.0, True, None),
    ("closed by data, fp32", ODD, FP32, FP32, 0.0, 0.3, False, None),
    ("open by data: γ = 1", ODD, BF16, FP32, 1.0, 0.0, True, None),
    ("negative γ: a search may cross 0", ODD, BF16, FP32, -0.5, 0.0, False, None),
    ("no tokens: an expert nobody chose", (0, 48, 40, 4), BF16, FP32, SIGMOID, 0.3, True, None),
    ("no tokens, fp32", (0, 48, 40, 4), FP32, FP32, None, 0.0, False, None),
    ("no out-features", (5, 48, 0, 4), FP32, FP32, SIGMOID, 0.3, True, None),
    ("no in-features", (5, 0, 40, 4), FP32, FP32, SIGMOID, 0.3, True, None),
    ("rank 1: below every tile", (37, 48, 40, 1), BF16, FP32, SIGMOID, 0.3, True, None),
    ("rank 70: no multiple of 16", (37, 48, 40, 70), BF16, FP32, SIGMOID, 0.3, True, None),
    ("rank above K and N", (37, 5, 3, 16), FP32, FP32, SIGMOID, 0.0, True, None),
    ("tile multiples", (64, 128, 64, 16), BF16, BF16, SIGMOID, 0.0, False, None),
    ("long K: fp32 sums", (8, 2048, 16, 8), BF16, FP32, None, 0.0, False, None),
    ("many tokens: long sums", (1024, 32, 24, 4), BF16, FP32, SIGMOID, 0.0, True, None),
    ("x is every second column of a buffer", ODD, BF16, FP32, SIGMOID, 0.3, True, "strided"),
    ("x is a transpose", ODD, BF16, FP32, None, 0.0, False, "transposed"),
    ("x starts inside a wider buffer", ODD, FP32, FP32, SIGMOID, 0.3, True, "offset"),
    ("x repeats one row: stride 0", ODD, BF16, FP32, SIGMOID, 0.0, True, "expanded"),
    ("x is (batch, sequence, K)", (36, 48, 40, 4), BF16, FP32, SIGMOID, 0.3, True, "3-D"),
    ("x has no 2-D view", (36, 48, 40, 4), BF16, FP32, None, 0.3, False, "3-D strided"),
    ("x is one vector", ODD, FP32, FP32, None, 0.3, True, "1-D"),
    ("dy is every second column", ODD, BF16, FP32, SIGMOID, 0.0, True, "dy strided"),
    ("dy repeats one row, as after a sum", ODD, FP32, FP32, None, 0.3, True, "dy expanded"),
]  # fmt: skip


GRID += [
    (f"{why} (long)", (101 if row[0] == ODD else 102, *row[0][1:]), *row[1:])
    for why, *row in GRID
    if row[0][0] in (36, 37)
]


@pytest.mark.parametrize(
    ("shape", "dtype", "adapter_dtype", "gate", "dropout_p", "bias", "layout"),
    [row[1:] for row in GRID],
    ids=[row[0] for row in GRID],
)
def test_values_and_gradients_are_within_rounding(
    shape, dtype, adapter_dtype, gate, dropout_p, bias, layout
):
    inputs = make_inputs(*shape, dtype=dtype, adapter_dtype=adapter_dtype, gate=gate, bias=bias)
    if layout is not None:
        inputs = relaid(inputs, layout)
    assert_matches_reference(inputs, scale=2.0, dropout_p=dropout_p, seed=seeded(dropout_p))


@pytest.mark.parametrize("shape", [ODD, LONG])
@pytest.mark.parametrize("gate", [None, 0.0, 1.0, SIGMOID])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_eager_is_the_reference_in_fp64(shape, gate, dropout_p):
    inputs = make_inputs(*shape, dtype=torch.float64, gate=gate, bias=True)
    options = {"scale": 0.7, "dropout_p": dropout_p, "seed": seeded(dropout_p)}
    actual, expected = (
        values_and_grads(lambda i, word=word: ours(i, impl=word, **options), inputs)
        for word in ("eager", "reference")
    )
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@settings(max_examples=500)
@given(
    shape=st.tuples(
        st.integers(0, 90), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 8, 17])
    ),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    adapter_dtype=st.sampled_from([BF16, FP16, FP32]),
    gate=st.sampled_from([None, 0.0, 1.0, SIGMOID, -2.0]),
    scale=st.sampled_from([1.0, 2.0, 0.3]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.3]),
    bias=st.booleans(),
    requires=st.sets(st.sampled_from(NAMES)),
    layout=st.sampled_from([None, "strided", "transposed", "offset", "dy strided"]),
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
    )
    if layout is not None:
        inputs = relaid(inputs, layout)
    dropout_seed = torch.tensor([seed]) if dropout_p else None
    assert_matches_reference(inputs, scale=scale, dropout_p=dropout_p, seed=dropout_seed)


@pytest.mark.parametrize(
    ("x_shape", "n"), [((2, 3, 0), 4), ((0,), 4), ((2, 0, 5), 4), ((0, 3, 5), 4), ((2, 3, 5), 0)]
)
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_any_size_may_be_zero(x_shape, n, impl):
    k = x_shape[-1]
    x = torch.randn(x_shape, requires_grad=True)
    a, b = torch.randn(2, k, requires_grad=True), torch.randn(n, 2, requires_grad=True)
    y = masked_lora_linear(x, torch.randn(n, k), a, b, torch.ones(1), impl=impl)
    assert y.shape == (*x_shape[:-1], n)
    assert not y.any()
    y.sum().backward()
    for leaf in (x, a, b):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_uninitialised_memory_is_never_read(nan_filled_memory):
    assert torch.empty(3).isnan().all()
    for shape, dropout_p in itertools.product((ODD, LONG), (0.0, 0.3)):
        inputs = make_inputs(*shape, dtype=BF16, adapter_dtype=FP32, gate=SIGMOID, bias=True)
        assert_matches_reference(inputs, dropout_p=dropout_p, seed=seeded(dropout_p))


@pytest.fixture
def nan_filled_memory():
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


# --- laws of the gate


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_gate_equals_gate_one(dtype, dropout_p):
    # Bit for bit where α and α/(1−p) are powers of two: folding them in rounds nothing then. Other
    # scales round once there, which the grid covers, and so do few rows (SHORT_ROWS).
    gated = make_inputs(*LONG, dtype=dtype, gate=1.0, bias=True)
    options = {"scale": 2.0, "dropout_p": dropout_p, "seed": seeded(dropout_p)}
    with_gate = values_and_grads(lambda i: ours(i, **options), gated)
    without = values_and_grads(lambda i: ours(i, **options), dataclasses.replace(gated, gate=None))
    assert with_gate.keys() - without.keys() == {"dgate"}
    for name, value in without.items():
        assert torch.equal(value, with_gate[name]), name


@pytest.mark.parametrize("shape", [ODD, LONG, (128, 192, 320, 8)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_gate_zero_equals_bare_linear_and_still_has_its_gradient(dtype, bias, shape):
    inputs = make_inputs(*shape, dtype=dtype, gate=0.0, bias=bias)
    got = assert_matches_reference(inputs, scale=2.0)
    bare = F.linear(inputs.x, inputs.weight, inputs.bias)
    assert torch.equal(got["y"], bare)
    assert torch.equal(got["dx"], torch.autograd.grad(bare, inputs.x, inputs.dy)[0])
    assert got["dgate"].abs() > 1
    assert not got["dlora_a"].any()
    assert not got["dlora_b"].any()


@pytest.mark.parametrize("gate", [0.0, 1.0, SIGMOID, -3.0])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_db_times_b_equals_gate_times_dgate(gate, dropout_p):
    inputs = make_inputs(*ODD, dtype=torch.float64, gate=gate)
    got = values_and_grads(
        lambda i: ours(i, scale=1.7, dropout_p=dropout_p, seed=seeded(dropout_p)), inputs
    )
    for name in ("lora_a", "lora_b"):
        inner = (got[f"d{name}"] * getattr(inputs, name)).sum()
        torch.testing.assert_close(inner, gate * got["dgate"][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gate_keeps_its_shape_and_dtype(shape):
    inputs = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.5)
    gate = inputs.gate.detach().reshape(shape).requires_grad_()
    got = values_and_grads(ours, dataclasses.replace(inputs, gate=gate))
    assert got["dgate"].shape == shape
    assert got["dgate"].dtype == FP32


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gate_is_never_read_by_the_host(dropout_p):
    # A meta tensor has no data: whatever asks for a value raises.
    inputs = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.0, bias=True, device="meta")
    got = values_and_grads(lambda i: ours(i, dropout_p=dropout_p), inputs)
    assert got["y"].shape == (37, 40)
    assert {name: got[f"d{name}"].dtype for name in NAMES} == {
        name: t.dtype for name, t in inputs.wanted().items()
    }


# --- what is computed, saved and made on the way


@pytest.mark.parametrize("requires", COMBINATIONS, ids="-".join)
def test_only_what_is_wanted_gets_a_gradient(requires):
    inputs = make_inputs(3, 4, 5, 2, dtype=FP32, gate=0.5, bias=True, requires=requires)
    ours(inputs, dropout_p=0.2).backward(inputs.dy)
    assert {name for name in NAMES if getattr(inputs, name).grad is not None} == set(requires)


def test_nothing_wanted_makes_no_graph():
    inputs = make_inputs(*ODD, dtype=FP32, gate=0.5, requires=())
    assert not ours(inputs, dropout_p=0.3).requires_grad
    with torch.no_grad():
        assert not ours(inputs.wanting(NAMES)).requires_grad


def saved_by(function) -> list[tuple[int, ...]]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        function()
    return saved


M, K, N, R = LONG
PARAMETER_SHAPES = {(N, K), (R, K), (N, R), (1,)}


@pytest.mark.parametrize(
    ("requires", "activations"),
    [
        ({"gate"}, {(M, R)}),  # the mask search: t, and not x
        ({"gate", "x"}, {(M, R)}),
        ({"x"}, set()),  # frozen, above an open layer
        ({"bias"}, set()),
        ({"lora_b"}, {(M, R)}),
        ({"lora_a"}, {(M, K)}),
        ({"x", "lora_a", "lora_b"}, {(M, K), (M, R)}),  # LoRA training
        ({"weight"}, {(M, K)}),
        (set(NAMES), {(M, K), (M, R)}),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_only_what_backward_reads_is_saved(requires, activations, dropout_p):
    # With dropout just the same, and a seed of one element: no mask, no x̂.
    inputs = make_inputs(*LONG, dtype=BF16, adapter_dtype=FP32, gate=0.5, requires=requires)
    saved = saved_by(lambda: ours(inputs, dropout_p=dropout_p))
    assert set(saved) - PARAMETER_SHAPES == activations
    assert len([shape for shape in saved if shape in activations]) == len(activations)


class Made(TorchDispatchMode):
    """Record shape and dtype of every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.made += [(func, tuple(t.shape), t.dtype) for t in outputs if isinstance(t, Tensor)]
        return result


@pytest.mark.parametrize("gate", [None, 0.5])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_fp32_tensor_of_the_size_of_x_or_y_is_ever_made(gate, dropout_p):
    inputs = make_inputs(*LONG, dtype=BF16, adapter_dtype=FP32, gate=gate, bias=True)
    with Made() as mode:
        ours(inputs, scale=1.7, dropout_p=dropout_p).backward(inputs.dy)
    assert (torch.ops.aten.addmm_.default, (M, N), BF16) in mode.made
    wide = [row for row in mode.made if row[2] == FP32 and math.prod(row[1]) >= min(M * K, M * N)]
    # dW and the adapters' own gradients are as large as they are; nothing here has M rows.
    assert [row for row in wide if M in row[1]] == []


def test_without_dropout_one_tensor_of_the_size_of_y_is_made():
    inputs = make_inputs(*LONG, dtype=BF16, adapter_dtype=FP32, gate=0.5)
    with Made() as mode:
        ours(inputs)
    outputs = [func.overloadpacket for func, shape, _ in mode.made if shape == (M, N)]
    assert outputs == [torch.ops.aten.mm, torch.ops.aten.addmm_]


# --- autograd etiquette


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_twice_gives_the_same(dropout_p):
    inputs = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.5, bias=True)
    y = ours(inputs, dropout_p=dropout_p)
    wanted = list(inputs.wanted().values())
    first = torch.autograd.grad(y, wanted, inputs.dy, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(y, wanted, inputs.dy)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_x_may_be_used_twice():
    inputs = make_inputs(*ODD, dtype=torch.float64, gate=0.5)

    def function(impl):
        def run(i):
            y = ours(i, scale=1.7, impl=impl)
            return y + ours(dataclasses.replace(i, lora_b=-2 * i.lora_b), impl=impl) * i.x[:, :N]

        return run

    actual = values_and_grads(function("eager"), inputs)
    expected = values_and_grads(function("reference"), inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [None, "3-D", "1-D"])
def test_caller_may_change_the_output_in_place(layout):
    inputs = make_inputs(36, 48, 40, 4, dtype=torch.float64, gate=0.5, bias=True)
    inputs = inputs if layout is None else relaid(inputs, layout)
    actual = values_and_grads(lambda i: ours(i).mul_(2.0).add_(1.0), inputs)
    expected = values_and_grads(lambda i: ours(i, impl="reference") * 2.0 + 1.0, inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_inputs_are_not_written_to(dropout_p):
    inputs = make_inputs(*ODD, dtype=FP32, gate=0.5, bias=True)
    before = {f.name: getattr(inputs, f.name).detach().clone() for f in dataclasses.fields(inputs)}
    values_and_grads(lambda i: ours(i, dropout_p=dropout_p), inputs)
    for name, value in before.items():
        assert torch.equal(getattr(inputs, name), value), name
        assert getattr(inputs, name)._version == 0, name


def test_changing_x_before_backward_raises():
    inputs = make_inputs(*LONG, dtype=FP32, requires=["lora_a"])
    y = ours(inputs)
    inputs.x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


def test_changing_x_is_allowed_where_backward_does_not_read_it():
    inputs = make_inputs(*ODD, dtype=FP32, gate=0.5, requires=["gate", "lora_b"])
    expected = values_and_grads(ours, inputs)
    y = ours(inputs)
    inputs.x.zero_()
    y.backward(inputs.dy)
    assert torch.equal(inputs.gate.grad, expected["dgate"])
    assert torch.equal(inputs.lora_b.grad, expected["dlora_b"])


def test_second_derivatives_raise():
    # Even where dy requires no grad: a gradient penalty would otherwise lose terms.
    inputs = make_inputs(3, 4, 5, 2, dtype=torch.float64, gate=0.5)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*impl='reference'"):
        torch.autograd.grad(ours(inputs).sum(), inputs.x, create_graph=True)


def test_few_rows_on_a_cpu_are_left_to_torchs_autograd():
    # As `masked_lora_linear` says: where overheads are the cost, and with a gradient of its own.
    inputs = make_inputs(3, 4, 5, 2, dtype=torch.float64)
    (dx,) = torch.autograd.grad(ours(inputs).square().sum(), inputs.x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), inputs.lora_a)[0].abs().max() > 0
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(derived(inputs, 1.0, 0.0, None).sum(), inputs.x, create_graph=True)


def test_reference_has_second_derivatives():
    inputs = make_inputs(3, 4, 5, 2, dtype=torch.float64, gate=0.5)
    (dx,) = torch.autograd.grad(
        ours(inputs, impl="reference").square().sum(), inputs.x, create_graph=True
    )
    assert torch.autograd.grad(dx.sum(), inputs.gate)[0].abs() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpointing_changes_nothing(use_reentrant, dropout_p):
    inputs = make_inputs(*ODD, dtype=BF16, adapter_dtype=FP32, gate=0.5, bias=True)

    def run(i):
        return ours(i, dropout_p=dropout_p)

    torch.manual_seed(7)
    run(inputs).backward(inputs.dy)
    plain = {name: t.grad for name, t in inputs.wanted().items()}
    again = inputs.wanting(NAMES)
    torch.manual_seed(7)
    # Reentrant: x is what the checkpoint sees, the parameters come with the closure.
    y = checkpoint(
        lambda x: run(dataclasses.replace(again, x=x)), again.x, use_reentrant=use_reentrant
    )
    torch.manual_seed(8)  # what runs in between draws on
    y.backward(again.dy)
    for name, tensor in again.wanted().items():
        assert torch.equal(tensor.grad, plain[name]), name


# --- dtypes: autocast


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast_casts_as_linear_does(x_dtype, dropout_p):
    inputs = make_inputs(*ODD, dtype=FP32, gate=0.5, bias=True)
    inputs = dataclasses.replace(inputs, x=inputs.x.detach().to(x_dtype).requires_grad_())
    options = {"scale": 2.0, "dropout_p": dropout_p, "seed": seeded(dropout_p)}
    bare = F.linear
    with torch.autocast("cpu", BF16):
        y = ours(inputs, **options)
        assert y.dtype == bare(inputs.x, inputs.weight, inputs.bias).dtype == BF16
    wanted = inputs.wanted()
    grads = torch.autograd.grad(y, list(wanted.values()), inputs.dy.bfloat16())
    wide, narrow = inputs.cast(torch.float64), inputs.cast(BF16)
    wide, narrow = (
        values_and_grads(lambda i: ours(i, impl="reference", **options), i) for i in (wide, narrow)
    )
    assert_within_rounding(y, wide["y"], narrow["y"], "y")
    for (name, tensor), grad in zip(wanted.items(), grads, strict=True):
        assert grad.dtype == tensor.dtype
        assert_within_rounding(grad, wide[f"d{name}"], narrow[f"d{name}"], f"d{name}")


def test_autocast_leaves_fp64_alone():
    inputs = make_inputs(*ODD, dtype=torch.float64, gate=0.5, bias=True)
    with torch.autocast("cpu", BF16):
        y = ours(inputs)
        assert y.dtype == F.linear(inputs.x, inputs.weight).dtype == torch.float64
    assert torch.equal(y, ours(inputs))


def test_autocast_around_backward_only_rounds():
    inputs = make_inputs(*ODD, dtype=FP32, gate=0.5, bias=True)
    y = ours(inputs)
    with torch.autocast("cpu", BF16):
        y.backward(inputs.dy)
    wide = values_and_grads(ours, inputs.cast(torch.float64))
    narrow = values_and_grads(lambda i: ours(i, impl="reference"), inputs.cast(BF16))
    for name, tensor in inputs.wanted().items():
        assert tensor.grad.dtype == FP32
        assert_within_rounding(tensor.grad, wide[f"d{name}"], narrow[f"d{name}"], name)

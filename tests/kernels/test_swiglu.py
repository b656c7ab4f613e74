"""The SwiGLU product and the linear that recomputes it: the bits of plain autograd."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.nn import functional as F

from ila_kernels import masked_lora_linear, swiglu_product
from ila_kernels.testing import assert_within_rounding, make_inputs

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BOTH = (True, True)
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def pair(*shape: int, dtype: torch.dtype = FP64, requires=BOTH, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=FP64).mul(3).to(dtype) for _ in "ab"]
    return [t.requires_grad_(wanted) for t, wanted in zip(tensors, requires, strict=True)]


def grads_of(y: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy))


def kept_by(compute) -> tuple[Tensor, set[int]]:
    """The result, and the addresses of the storages that its graph keeps."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compute()
    return y, {t.untyped_storage().data_ptr() for t in kept}


# --- the product


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, torch.float16])
@pytest.mark.parametrize("requires", [BOTH, (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(37, 48), (1,), (0, 8), (2, 3, 65)])
@every_activation
def test_product_and_gradients_are_the_bits_of_plain_autograd(shape, requires, dtype, activation):
    pre, up = pair(*shape, dtype=dtype, requires=requires)
    dy = torch.randn(shape).to(dtype)
    y, plain = swiglu_product(pre, up, activation), ACTIVATIONS[activation](pre) * up
    assert y.dtype == dtype
    assert torch.equal(y, plain)
    for mine, theirs in zip(
        grads_of(y, [pre, up], dy), grads_of(plain, [pre, up], dy), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_product_takes_strided_inputs_and_an_expanded_gradient():
    pre, up = (t.detach().t().requires_grad_() for t in pair(5, 7))
    mine, theirs = (
        torch.autograd.grad(y.sum(), [pre, up]) for y in (swiglu_product(pre, up), F.silu(pre) * up)
    )
    assert all(map(torch.equal, mine, theirs))


@every_activation
def test_product_has_first_and_second_derivatives(activation):
    inputs = pair(3, 4)
    function = partial(swiglu_product, activation=activation)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    ("requires", "kept"),
    [(BOTH, "pre up"), ((True, False), "pre up"), ((False, True), "pre"), ((False, False), "")],
)
@every_activation
def test_product_keeps_its_inputs_only(requires, kept, activation):
    pre, up = pair(3, 4, requires=requires)
    named = {"pre": pre.data_ptr(), "up": up.data_ptr()}
    _, addresses = kept_by(lambda: swiglu_product(pre, up, activation))
    assert addresses == {named[name] for name in kept.split()}
    with torch.no_grad():
        assert swiglu_product(pre, up).grad_fn is None


def test_changing_an_input_in_place_is_noticed():
    pre, up = pair(3, 4)
    leaf = pre.clone()
    y = swiglu_product(leaf, up)
    leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- the linear that recomputes x = h


def linear(pre, up, i, swiglu: bool, dropout_p=0.0, activation="silu", **options) -> Tensor:
    h = swiglu_product(pre, up, activation)
    seed = torch.tensor([3]) if dropout_p else None
    return masked_lora_linear(
        h, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, scale=1.7, dropout_p=dropout_p,
        seed=seed, swiglu=(pre, up) if swiglu else None, activation=activation, **options,
    )  # fmt: skip


def case(m, dtype, gate=None, requires=("lora_a", "lora_b"), bias=False, pair_requires=BOTH):
    adapter_dtype = FP32 if dtype == BF16 else dtype
    i = make_inputs(
        m, 24, 10, 3, dtype=dtype, adapter_dtype=adapter_dtype, gate=gate, bias=bias,
        requires=requires,
    )  # fmt: skip
    pre, up = pair(m, 24, dtype=dtype, requires=pair_requires)
    leaves = {"pre": pre, "up": up} | {name: t for name, t in i.wanted().items() if name != "x"}
    return pre, up, i, [t for t in leaves.values() if t.requires_grad]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [FP64, BF16])
@pytest.mark.parametrize(
    ("m", "gate", "requires", "pair_requires"),
    [
        (70, None, ("lora_a", "lora_b"), BOTH),  # LoRA training
        (70, 0.5, ("gate",), BOTH),  # the search
        (70, 0.5, ("weight", "lora_a", "lora_b", "gate", "bias"), BOTH),
        (70, None, ("lora_a",), (True, False)),  # up_proj below the lowest open layer
        (70, None, ("lora_b",), (False, True)),
        (70, None, ("lora_a", "lora_b"), (False, False)),
        (70, None, (), BOTH),  # only what lies before has something to learn
        (5, None, ("lora_a", "lora_b"), BOTH),  # few rows: autograd differentiates
        (5, 0.5, ("lora_a", "gate"), BOTH),
        (0, None, ("lora_a", "lora_b"), BOTH),
    ],
)
@every_activation
def test_recomputing_changes_no_bit(m, gate, requires, pair_requires, dtype, dropout_p, activation):
    pre, up, i, leaves = case(m, dtype, gate, requires, "bias" in requires, pair_requires)
    y, plain = (linear(pre, up, i, swiglu, dropout_p, activation) for swiglu in (True, False))
    assert torch.equal(y, plain)
    dy = torch.randn(y.shape).to(dtype)
    mine, theirs = (torch.autograd.grad(result, leaves, dy) for result in (y, plain))
    assert all(map(torch.equal, mine, theirs))
    assert [g.dtype for g in mine] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@every_activation
def test_recomputing_linear_passes_gradcheck(dropout_p, activation):
    pre, up, i, leaves = case(4, FP64, 0.5, ("lora_a", "lora_b", "gate"))
    assert len(leaves) == 5

    def function(*_):
        return linear(pre, up, i, True, dropout_p, activation)

    assert torch.autograd.gradcheck(function, leaves)


@every_activation
def test_bf16_gradients_are_within_rounding_of_fp64(activation):
    pre, up, i, leaves = case(130, BF16)
    dy = torch.randn(130, 10).to(BF16)
    results = []
    for dtype in (None, FP64, BF16):
        casts = [pre, up, i]
        if dtype is not None:
            casts = [t.detach().to(dtype).requires_grad_() for t in (pre, up)] + [i.cast(dtype)]
        leaves = [*casts[:2], casts[2].lora_a, casts[2].lora_b]
        options = {} if dtype is None else {"impl": "reference"}
        y = linear(*casts, dtype is None, activation=activation, **options)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for name, mine, exact, eager in zip(("y", "dpre", "dup", "dA", "dB"), *results, strict=True):
        assert_within_rounding(mine, exact, eager, name)


@pytest.mark.parametrize("requires", [("lora_a", "lora_b"), ("lora_b",), ("gate",)])
def test_linear_keeps_pre_and_up_and_nothing_else_of_their_size(requires):
    pre, up, i, _ = case(70, FP64, 0.5, requires)
    small = {t.data_ptr() for t in (i.weight, i.lora_a, i.lora_b, i.gate)}
    y, addresses = kept_by(lambda: linear(pre, up, i, True))
    large = addresses - small
    assert {pre.data_ptr(), up.data_ptr()} <= large
    assert len(large) == 3  # and t (M, R)
    assert pre.numel() == 70 * 24
    y.sum().backward()
    assert pre.grad is not None


def test_what_else_reads_h_keeps_its_gradient():
    pre, up, i, leaves = case(70, FP64)

    def both(swiglu):
        h = swiglu_product(pre, up)
        recipe = (pre, up) if swiglu else None
        y = masked_lora_linear(h, i.weight, i.lora_a, i.lora_b, swiglu=recipe)
        return y.square().sum() + h.square().sum()

    mine, theirs = (torch.autograd.grad(both(swiglu), leaves) for swiglu in (True, False))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_autocast_rounds_h_on_its_way_in():
    pre, up, i, leaves = case(70, FP32)
    results = []
    for swiglu in (True, False):
        with torch.autocast("cpu", BF16):
            y = linear(pre, up, i, swiglu)
        assert y.dtype == BF16
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(map(torch.equal, *results))


def test_recomputing_linear_has_first_derivatives_only():
    pre, up, i, leaves = case(70, FP64)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(linear(pre, up, i, True).sum(), leaves, create_graph=True)


@pytest.mark.parametrize(("requires", "dropout_p"), [(("lora_a", "lora_b"), 0.4), (("gate",), 0.0)])
@every_activation
def test_op_keeps_its_contract_when_it_recomputes(requires, dropout_p, activation):
    pre, up, i, _ = case(5, FP64, 0.5, requires)
    seed = torch.tensor([5]) if dropout_p else None
    x = swiglu_product(pre, up, activation).detach()
    arguments = (x, i.weight, i.lora_a, i.lora_b, i.gate, None, seed, 1.7, dropout_p, "eager")
    found = opcheck(torch.ops.ila.masked_lora_linear.default, (*arguments, pre, up, activation))
    assert set(found.values()) == {"SUCCESS"}
    assert len(found) == 4


@every_activation
def test_compiled_in_one_graph_it_computes_the_same(activation):
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (70, 90):
        pre, up, i, leaves = case(m, FP64)
        y = compiled(pre, up, i, True, activation=activation)
        plain = linear(pre, up, i, False, activation=activation)
        dy = torch.randn(y.shape, dtype=FP64)
        results = [[r, *torch.autograd.grad(r, leaves, dy)] for r in (y, plain)]
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


# --- errors


@pytest.mark.parametrize(
    ("pre", "up", "error", "message"),
    [
        ("pre", torch.ones(2), TypeError, "pre must be a tensor, got str"),
        (torch.ones(2), torch.ones(2).int(), TypeError, "up must have a floating dtype.*int32"),
        (torch.ones(2), torch.ones(2).half(), TypeError, r"up must have the dtype of pre.*float32"),
        (torch.ones(2), torch.ones(3), ValueError, r"up must have shape \(2,\) like pre.*\(3,\)"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, "up must be on cpu.*meta"),
    ],
)
def test_product_says_what_does_not_fit(pre, up, error, message):
    with pytest.raises(error, match=message):
        swiglu_product(pre, up)


def test_another_activation_is_refused():
    pre, up = pair(2, 3)
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'relu'"):
        swiglu_product(pre, up, "relu")


def test_linear_says_what_of_its_recipe_does_not_fit():
    i = make_inputs(70, 24, 10, 3, dtype=FP64)
    wrong = torch.ones(7, 24, dtype=FP64)
    with pytest.raises(ValueError, match=r"pre must have shape \(70, 24\) like x, got \(7, 24\)"):
        masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, swiglu=(wrong, wrong))

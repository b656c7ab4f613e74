"""A packed W is W: bitsandbytes' forward and dx, our update, and no dense W kept in between."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.functional import masked_lora_linear as public
from ila_kernels.quant import Packed4bit, Packed8bit, PackedWeight
from ila_kernels.reference import masked_lora_linear as specification
from ila_kernels.testing import assert_within_rounding, make_inputs, values_and_grads

bnb = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "nf4-double", "fp4", "int8")
# 37 rows of 48: no block of 64 ends where a row does; N and the rank are no powers of two.
SIZES = (37, 48, 40, 3)


def pack(weight: Tensor, kind: str, compute_dtype: torch.dtype | None = None) -> PackedWeight:
    if kind == "int8":
        state = bnb.MatmulLtState()
        state.has_fp16_weights, state.threshold = False, 6.0
        state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return Packed8bit(state)
    data, state = bnb.functional.quantize_4bit(
        weight, quant_type=kind[:3], compress_statistics=kind.endswith("double")
    )
    return Packed4bit(data, state, compute_dtype)


def peer(packed: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The frozen linear with bitsandbytes' own autograd."""
    if isinstance(packed, Packed8bit):
        return bnb.matmul(x, packed.data, bias=bias, state=packed.state)
    dtype = packed.compute_dtype or x.dtype
    bias = None if bias is None else bias.to(dtype)
    y = bnb.matmul_4bit(x.to(dtype), packed.data, quant_state=packed.state, bias=bias)
    return y.to(x.dtype)


def low_rank(i, scale: float) -> Tensor:
    gate = 1.0 if i.gate is None else i.gate
    return gate * scale * (i.x @ i.lora_a.to(i.x.dtype).t() @ i.lora_b.to(i.x.dtype).t())


def frozen(*sizes: int, dtype: torch.dtype = torch.float32, **options):
    """Inputs whose W and bias are frozen, as a packed base's are."""
    wanted = ("x", "lora_a", "lora_b", "gate")
    return make_inputs(*sizes, dtype=dtype, requires=wanted, **options)


@pytest.mark.parametrize("sizes", [SIZES, (1, 64, 32, 8), (130, 32, 96, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_bitsandbytes_and_lora(kind, dtype, sizes):
    inputs = frozen(*sizes, dtype=dtype, adapter_dtype=torch.float32, gate=0.7, bias=True)
    packed = pack(inputs.weight, kind)
    actual = values_and_grads(
        lambda i: masked_lora_linear(
            i.x, packed, i.lora_a, i.lora_b, i.gate, bias=i.bias, scale=1.5
        ),
        inputs,
    )
    theirs = values_and_grads(
        lambda i: peer(packed, i.x, i.bias) + low_rank(i, 1.5), inputs.cast(dtype)
    )
    dense = packed.dense(dtype).double()

    def in_fp64(i):
        return specification(i.x, dense, i.lora_a, i.lora_b, i.gate, i.bias, 1.5)

    expected = values_and_grads(in_fp64, inputs.cast(torch.float64))
    for name, value in actual.items():
        assert_within_rounding(value, expected[name], theirs[name], name)
    assert actual["dx"].dtype == dtype and actual["dlora_a"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_gradients_are_the_derivatives_in_fp64(kind):
    inputs = frozen(5, 16, 6, 2, dtype=torch.float64, gate=0.4, bias=True)
    packed = pack(inputs.weight.float(), kind)

    def apply(x, a, b, gate):
        return masked_lora_linear(x, packed, a, b, gate, bias=inputs.bias, scale=0.5)

    torch.autograd.gradcheck(apply, (inputs.x, inputs.lora_a, inputs.lora_b, inputs.gate))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_zero_leaves_the_bits_of_bitsandbytes(kind, training):
    inputs = frozen(*SIZES, bias=True)
    packed = pack(inputs.weight, kind)
    if kind == "int8":
        packed.state.is_training = training  # in evaluation bitsandbytes quantises x too
    with torch.no_grad():
        expected = peer(packed, inputs.x, inputs.bias)
        y = masked_lora_linear(
            inputs.x, packed, inputs.lora_a, torch.zeros_like(inputs.lora_b), bias=inputs.bias
        )
    assert y.equal(expected)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
def test_the_base_runs_in_its_compute_dtype_and_the_update_in_that_of_x(compute, adapter):
    inputs = frozen(*SIZES, adapter_dtype=adapter, gate=0.7)
    packed = pack(inputs.weight, "nf4", compute)
    actual = values_and_grads(
        lambda i: masked_lora_linear(i.x, packed, i.lora_a, i.lora_b, i.gate), inputs
    )
    theirs = values_and_grads(lambda i: peer(packed, i.x, None) + low_rank(i, 1.0), inputs)
    assert actual["y"].dtype == actual["dx"].dtype == torch.float32
    with torch.no_grad():
        update = low_rank(inputs, 1.0)
        base = peer(packed, inputs.x, None)
        dx_update = inputs.gate * (inputs.dy @ inputs.lora_b.float() @ inputs.lora_a.float())
        dx_base = (inputs.dy.to(compute) @ packed.dense(compute)).float()
    # fp32 additions of the very same base results: what is left is rounding of the update.
    assert_within_rounding(actual["y"] - base, update.double(), theirs["y"] - base, "update")
    assert_within_rounding(
        actual["dx"] - dx_base, dx_update.double(), theirs["dx"] - dx_base, "dx of the update"
    )


class Watched(Packed4bit):
    """Remembers every dense W it made, without keeping it alive."""

    def __init__(self, packed: Packed4bit):
        super().__init__(packed.data, packed.state, packed.compute_dtype)
        self.made: list[weakref.ref] = []

    def dense(self, dtype):
        w = super().dense(dtype)
        self.made.append(weakref.ref(w))
        return w


@pytest.mark.parametrize("grouped", [False, True])
def test_no_dense_weight_lives_from_forward_to_backward(grouped):
    inputs = frozen(8, 64, 32, 4)
    packed = Watched(pack(inputs.weight, "nf4"))
    saved: list[Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if grouped:
            y = sum(
                masked_lora_linear_group(
                    inputs.x, [packed] * 2, [inputs.lora_a, None], [inputs.lora_b, None]
                )
            )
        else:
            y = masked_lora_linear(inputs.x, packed, inputs.lora_a, inputs.lora_b)
    assert not packed.made, "forward is bitsandbytes' matmul"
    kept = {t.data_ptr(): t.nbytes for t in saved}
    own = (inputs.x, inputs.lora_a, inputs.lora_b)
    t_bytes = 8 * 4 * 4  # t (M, R) in fp32
    assert sum(kept.values()) == sum(t.nbytes for t in own) + t_bytes
    y.sum().backward()
    gc.collect()
    assert len(packed.made) == (2 if grouped else 1)
    assert all(ref() is None for ref in packed.made)


def test_a_search_over_a_packed_weight_keeps_t_alone():
    inputs = frozen(8, 64, 32, 4, gate=0.5).wanting(["gate"])
    packed = Watched(pack(inputs.weight, "nf4"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = masked_lora_linear(inputs.x, packed, inputs.lora_a, inputs.lora_b, inputs.gate)
    assert not any(t.shape == inputs.x.shape for t in saved)
    y.sum().backward()
    assert not packed.made, "nothing below wants a gradient, so W is not unpacked"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_a_group_is_its_members_and_may_mix_packed_dense_and_closed(kind, dropout_p):
    inputs = frozen(*SIZES, gate=0.7)
    packed, seed = pack(inputs.weight, kind), torch.arange(3)
    leaves = (inputs.x, inputs.lora_a, inputs.lora_b, inputs.gate)

    def together():
        return masked_lora_linear_group(
            inputs.x,
            [packed, inputs.weight, packed],
            [inputs.lora_a, inputs.lora_a, None],
            [inputs.lora_b, inputs.lora_b, None],
            [inputs.gate, None, None],
            dropout_p=dropout_p,
            seed=seed,
        )

    def apart():
        x, a, b, gate = leaves
        options = {"dropout_p": dropout_p}
        return (
            masked_lora_linear(x, packed, a, b, gate, seed=seed[:1], **options),
            masked_lora_linear(x, inputs.weight, a, b, seed=seed[1:2], **options),
            peer(packed, x, None),
        )

    results = []
    for run in (together, apart):
        ys = run()
        grads = torch.autograd.grad(ys, leaves, [inputs.dy] * 3)
        results.append([*(y.detach() for y in ys), *grads])
    for one, other in zip(*results, strict=True):
        # The same products added in another order.
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_autocast_rounds_x_only_where_the_base_would():
    inputs = frozen(*SIZES, dtype=torch.float32)
    a, b = inputs.lora_a, inputs.lora_b
    for compute, rounded in ((torch.bfloat16, True), (torch.float32, False)):
        packed = pack(inputs.weight, "nf4", compute)
        saved = []
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t
            ):
                y = masked_lora_linear(inputs.x, packed, a, b)
                ys = masked_lora_linear_group(inputs.x, [packed, inputs.weight], [a, a], [b, b])
            (y.sum() + ys[0].sum() + ys[1].sum()).backward()
        kept = {t.dtype for t in saved if t.shape == inputs.x.shape}
        assert kept == {torch.bfloat16 if rounded else torch.float32}
        assert y.dtype == ys[0].dtype == ys[1].dtype == inputs.x.dtype
        assert inputs.x.grad.dtype == torch.float32
        dense = packed.dense(torch.float32).double()
        expected = specification(inputs.x.double(), dense, a.double(), b.double())
        with torch.autocast("cpu", torch.bfloat16):
            eager = F.linear(inputs.x, dense.float()) + F.linear(F.linear(inputs.x, a), b)
        assert_within_rounding(y, expected, eager if rounded else eager.float())
        assert_within_rounding(ys[0], expected, eager)


def test_no_rows_and_leading_dimensions():
    inputs = frozen(6, 32, 16, 2)
    packed = pack(inputs.weight, "nf4")
    empty = masked_lora_linear(inputs.x[:0], packed, inputs.lora_a, inputs.lora_b)
    assert empty.shape == (0, 16)
    flat = masked_lora_linear(inputs.x, packed, inputs.lora_a, inputs.lora_b)
    folded = masked_lora_linear(inputs.x.view(2, 3, 32), packed, inputs.lora_a, inputs.lora_b)
    assert folded.equal(flat.view(2, 3, 16))


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_a_packed_weight_never_goes_to_kernels_and_the_reference_takes_it(impl):
    inputs = frozen(6, 32, 16, 2)
    packed = pack(inputs.weight, "nf4")
    arguments = (inputs.x, packed, inputs.lora_a, inputs.lora_b)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' was asked for, but W is packed"):
        public(*arguments, impl=impl)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' was asked for, but W is packed"):
        masked_lora_linear_group(inputs.x, [packed], [inputs.lora_a], [inputs.lora_b], impl=impl)
    assert torch.allclose(public(*arguments, impl="reference"), public(*arguments), rtol=1e-5)


def test_mistakes_are_named():
    inputs = frozen(6, 32, 16, 2)
    packed = pack(inputs.weight, "nf4")
    with pytest.raises(ValueError, match=r"weight must have shape \(N, 31\) to fit x"):
        masked_lora_linear(inputs.x[:, 1:], packed, inputs.lora_a, inputs.lora_b)
    with pytest.raises(ValueError, match="weight must be on meta like x, got cpu"):
        masked_lora_linear(inputs.x.to("meta"), packed, inputs.lora_a, inputs.lora_b)


# Dynamo itself instantiates the autograd functions that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_step_is_one_graph_and_keeps_no_dense_weight_either():
    torch.compiler.reset()
    inputs = frozen(70, 64, 32, 4)
    packed = pack(inputs.weight, "nf4-double", torch.float32)
    leaves = (inputs.x, inputs.lora_a, inputs.lora_b)

    def apply(x, a, b):
        rebuilt = Packed4bit(packed.data, packed.state, packed.compute_dtype)
        return masked_lora_linear(x, rebuilt, a, b, scale=0.5)

    compiled = torch.compile(apply, backend="aot_eager", fullgraph=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = compiled(*leaves)
    assert not any(t.shape == inputs.weight.shape for t in saved)
    actual = torch.autograd.grad(y, leaves, inputs.dy)
    expected = torch.autograd.grad(apply(*leaves), leaves, inputs.dy)
    for one, other in zip(actual, expected, strict=True):
        assert one.equal(other)

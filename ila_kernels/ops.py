"""The op contracts: schema, fake and autograd of each, and nothing else.

``torch.ops.ila.masked_lora_linear`` and ``…_group`` are what ``torch.compile`` and exporters see.
Outside of them the same two autograd formulas run as a plain ``autograd.Function``: forward and
backward of a (16, 64) x (64, 64) layer at R = 8 took 1.06 of the time of PEFT's own layer that way
against 1.81 through the Python dispatcher of a custom op (fp32, median of 60 interleaved rounds on
one CPU thread; ``eager.short_forward`` was timed in the same rounds).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ila_kernels import eager, group, swiglu, traced
from ila_kernels.eager import Needs
from ila_kernels.group import Member
from ila_kernels.quant import PackedWeight


def _path(impl: str):
    """Return the module whose ``forward`` and ``backward`` run; Triton is imported here at last."""
    if impl == "eager":
        return eager
    if impl == "triton":
        from ila_kernels.kernels import linear

        return linear
    raise ValueError(f"impl must be 'eager' or 'triton' here, got {impl!r}")


def _group_path(impl: str):
    """``_path`` of the group."""
    if _path(impl) is eager:
        return group
    from ila_kernels.kernels import group as kernels_group

    return kernels_group


def _forward(path, impl: str, inputs: tuple) -> tuple:
    if impl == "triton":
        from ila_kernels.kernels import selfcheck

        # Not at the public function: a compiled graph does not come by there.
        selfcheck.ensure(inputs[0].device)
    return path.forward(*inputs)


def _save(ctx, inputs, t) -> None:
    x, weight, lora_a, lora_b, gate, _bias, seed, scale, dropout_p, impl, pre, up = inputs
    # A custom op is not told of arguments at the end that were left out.
    wanted = (*ctx.needs_input_grad, False, False, False)
    needs = Needs(wanted[0] or wanted[10] or wanted[11], *wanted[1:6])
    ctx.needs, ctx.scale, ctx.dropout_p, ctx.impl = needs, scale, dropout_p, impl
    ctx.set_materialize_grads(False)
    # A packed weight is bytes of the model and how to read them: nothing of it is made to be kept.
    ctx.packed = weight if isinstance(weight, PackedWeight) and needs.x else None
    ctx.save_for_backward(
        x if needs.saves_x and pre is None else None,
        weight if needs.x and ctx.packed is None else None,
        lora_a,
        lora_b,
        gate,
        t if needs.saves_t else None,
        seed,
        pre,
        up,
    )


def _refuse_create_graph() -> None:
    # t is saved as a constant, so a second derivative would come out wrong without a word.
    # once_differentiable is not enough: it lets a dy that requires no grad pass.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "masked_lora_linear has first derivatives only, so backward cannot run with "
            "create_graph=True; use impl='reference' for higher ones"
        )


def _backward(ctx, dy, run):
    _refuse_create_graph()
    if dy is None:
        return (None,) * 12
    x, weight, *rest, pre, up = ctx.saved_tensors
    if pre is not None:
        silu = F.silu(pre)
        x = (silu * up).to(dy.dtype) if ctx.needs.saves_x else None  # autocast may have rounded x
    options = {"scale": ctx.scale, "dropout_p": ctx.dropout_p, "needs": ctx.needs}
    with _own_dtypes(dy, ctx.packed is not None):
        grads = run(dy, x, ctx.packed or weight, *rest, **options)
    dpre = dup = None
    if pre is not None and grads.x is not None:
        wanted = ctx.needs_input_grad[10:]
        dpre, dup = swiglu.input_grads(grads.x.to(pre.dtype), silu, pre, up, *wanted)
        grads = grads._replace(x=None)
    return (*grads, None, None, None, None, dpre, dup)


def _own_dtypes(dy: Tensor, packed: bool) -> AbstractContextManager:
    # A packed weight brings its compute dtype; autocast around backward would change the others.
    return torch.autocast(dy.device.type, enabled=False) if packed else nullcontext()


class MaskedLoraLinearFunction(torch.autograd.Function):
    """The op as an autograd function; same arguments, returns y only."""

    @staticmethod
    def forward(ctx, *inputs):
        """Run the forward of ``impl``, the tenth input, and keep what backward will read."""
        y, t = _forward(_path(inputs[9]), inputs[9], inputs[:9])
        _save(ctx, inputs, t)
        return y

    @staticmethod
    def backward(ctx, dy):
        """Return the gradients in the order of the arguments."""
        return _backward(ctx, dy, _path(ctx.impl).backward)


@torch.library.custom_op("ila::masked_lora_linear", mutates_args=())
def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    impl: str = "eager",
    pre: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (M, K), W (N, K), A (R, K), B (N, R) -> y (M, N), t (M, R); t is not differentiable.

    Where pre and up (M, K) are given, x = silu(pre) ⊙ up and is not differentiable here: backward
    recomputes x instead of keeping it, and goes on to pre and up.
    """
    inputs = (x, weight, lora_a, lora_b, gate, bias, seed, scale, dropout_p)
    return _forward(_path(impl), impl, inputs)


@masked_lora_linear.register_fake
def _(
    x, weight, lora_a, lora_b, gate, bias, seed, scale, dropout_p, impl="eager", pre=None, up=None
):
    t = x.new_empty(x.shape[0], lora_a.shape[0], dtype=eager.thin_dtype(x))
    return x.new_empty(x.shape[0], weight.shape[0]), t


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output[1])


def _op_backward(ctx, dy, _dt):
    triton = ctx.impl == "triton"
    return _backward(ctx, dy, traced.linear_backward if triton else eager.backward)


masked_lora_linear.register_autograd(_op_backward, setup_context=_setup_context)


def _save_group(ctx, members: list[Member], needs: list[Needs], x, ts, dropout_p, impl) -> None:
    ctx.needs, ctx.dropout_p, ctx.impl = needs, dropout_p, impl
    ctx.scales = [m.scale for m in members]
    ctx.set_materialize_grads(False)
    ctx.packed = [m.weight if isinstance(m.weight, PackedWeight) else None for m in members]
    saved = [x if any(n.saves_x for n in needs) else None]
    for m, n, p, t in zip(members, needs, ctx.packed, ts, strict=True):
        saved += [m.weight if n.x and p is None else None, m.lora_a, m.lora_b, m.gate, m.seed]
        saved.append(t if n.saves_t else None)
    ctx.save_for_backward(*saved)


def _group_grads(ctx, dys, run):
    _refuse_create_graph()
    x, *flat = ctx.saved_tensors
    rows = [flat[i : i + 6] for i in range(0, len(flat), 6)]
    members = [
        Member(packed or weight, a, b, gate, None, seed, scale, t, needs)
        for (weight, a, b, gate, seed, t), packed, scale, needs in zip(
            rows, ctx.packed, ctx.scales, ctx.needs, strict=True
        )
    ]
    dy = next((dy for dy in dys if dy is not None), None)
    with _own_dtypes(dy, dy is not None and any(ctx.packed)):
        return run(dys, x, members, ctx.dropout_p)


class MaskedLoraLinearGroupFunction(torch.autograd.Function):
    """The group as an autograd function: impl, p, scales, x; W, A, B, γ, bias, seed of each."""

    @staticmethod
    def forward(ctx, impl, dropout_p, scales, x, *flat):
        """Run the group's forward of ``impl``; returns the tuple of y."""
        rows = [flat[i : i + 6] for i in range(0, len(flat), 6)]
        members = [Member(*row, scale) for row, scale in zip(rows, scales, strict=True)]
        ys, ts = _forward(_group_path(impl), impl, (x, members, dropout_p))
        wanted = ctx.needs_input_grad[4:]
        needs = [Needs(ctx.needs_input_grad[3], *wanted[i : i + 5]) for i in range(0, len(flat), 6)]
        _save_group(ctx, members, needs, x, ts, dropout_p, impl)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        """One dx, then the gradients of each member in the order of the arguments."""
        dx, grads = _group_grads(ctx, dys, _group_path(ctx.impl).backward)
        return (None, None, None, dx, *(g for member in grads for g in (*member[1:], None)))


def absent(x: Tensor) -> Tensor:
    """Stand-in for a missing tensor in the group op: autograd takes no list that holds ``None``."""
    return x.new_empty(0)


def _members(weights, lora_as, lora_bs, gates, biases, seeds, scales) -> list[Member]:
    rows = []
    for i, scale in enumerate(scales):
        optional = (lora_as[i], lora_bs[i], gates[i], biases[i])
        # Not numel() == 0: an adapter of a layer with K = 0 or N = 0 has that too.
        a, b, gate, bias = (None if tensor.shape == (0,) else tensor for tensor in optional)
        seed = seeds[i : i + 1] if seeds is not None and a is not None else None
        rows.append(Member(weights[i], a, b, gate, bias, seed, scale))
    return rows


@torch.library.custom_op("ila::masked_lora_linear_group", mutates_args=())
def masked_lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gates: Sequence[Tensor],
    biases: Sequence[Tensor],
    seeds: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
    impl: str,
) -> list[Tensor]:
    """x (M, K) -> [y₁, y₂, …, t₁, t₂, …]; t is (M, 0) for a closed member, not differentiable.

    A missing A, B, γ or bias is an empty tensor (``absent``). ``impl`` has no default: of an op
    with lists, autograd wants as many gradients as arguments were given.
    """
    members = _members(weights, lora_as, lora_bs, gates, biases, seeds, scales)
    ys, ts = _forward(_group_path(impl), impl, (x, members, dropout_p))
    # An op's outputs may not share memory: the t's are slices of one GEMM.
    thin = eager.thin_dtype(x)
    return ys + [x.new_empty(x.shape[0], 0, dtype=thin) if t is None else t.clone() for t in ts]


@masked_lora_linear_group.register_fake
def _(x, weights, lora_as, lora_bs, gates, biases, seeds, scales, dropout_p, impl):
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    ranks = [a.shape[0] if a.dim() == 2 else 0 for a in lora_as]
    return ys + [x.new_empty(x.shape[0], r, dtype=eager.thin_dtype(x)) for r in ranks]


def _setup_group_context(ctx, inputs, output):
    x, weights, lora_as, lora_bs, gates, biases, seeds, scales, dropout_p, impl = inputs
    members = _members(weights, lora_as, lora_bs, gates, biases, seeds, scales)
    ts = [t if m.is_open else None for m, t in zip(members, output[len(members) :], strict=True)]
    ctx.mark_non_differentiable(*output[len(members) :])
    # ctx.needs_input_grad is flat here and nested in backward; requires_grad says the same in both.
    columns = (weights, lora_as, lora_bs, gates, biases)
    wanted = zip(*([t.requires_grad for t in column] for column in columns), strict=True)
    needs = [Needs(x.requires_grad, *row) for row in wanted]
    _save_group(ctx, members, needs, x, ts, dropout_p, impl)


def _group_backward(ctx, d_outputs):
    run = traced.group_backward if ctx.impl == "triton" else group.backward
    dx, grads = _group_grads(ctx, d_outputs[: len(ctx.scales)], run)
    by_argument = [list(column) for column in zip(*(g[1:] for g in grads), strict=True)]
    return (dx, *by_argument, None, None, None, None)


masked_lora_linear_group.register_autograd(_group_backward, setup_context=_setup_group_context)

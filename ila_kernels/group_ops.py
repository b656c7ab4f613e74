"""The op of several layers of one x: schema, fake and autograd of ``ila.masked_lora_linear_group``.

Members travel as flat lists of tensors, because neither an op nor an autograd function takes them
otherwise. As in ``ops``, an ``autograd.Function`` runs the same formula outside of compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ila_kernels import eager, group, paths, traced
from ila_kernels.eager import Grads, Needs
from ila_kernels.group import Member, rows_of
from ila_kernels.ops import own_dtypes, refuse_create_graph
from ila_kernels.quant import PackedWeight

GroupBackward = Callable[..., tuple[Tensor | None, list[Grads]]]


class MemberTensors(NamedTuple):
    """The tensors of a ``Member`` as the autograd function takes them."""

    weight: Tensor | PackedWeight
    lora_a: Tensor | None
    lora_b: Tensor | None
    gate: Tensor | None
    bias: Tensor | None
    seed: Tensor | None


class SavedMember(NamedTuple):
    """The tensors of one member that wait for backward; ``None`` where it reads nothing."""

    weight: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    gate: Tensor | None
    seed: Tensor | None
    t: Tensor | None


def _forward(
    impl: str, x: Tensor, members: Sequence[Member], dropout_p: float
) -> tuple[list[Tensor], list[Tensor | None]]:
    paths.ensure_checked(impl, x.device)
    return paths.group_path(impl).forward(x, members, dropout_p)


def _save(
    ctx,
    impl: str,
    x: Tensor,
    members: Sequence[Member],
    ts: Iterable[Tensor | None],
    dropout_p: float,
) -> None:
    """Keep x once, and the tensors that the ``needs`` of each member read."""
    ctx.needs, ctx.dropout_p, ctx.impl = [m.needs for m in members], dropout_p, impl
    ctx.scales = [m.scale for m in members]
    ctx.set_materialize_grads(False)
    ctx.packed = [m.weight if isinstance(m.weight, PackedWeight) else None for m in members]
    saved = [x if any(m.needs.saves_x for m in members) else None]
    for m, packed, t in zip(members, ctx.packed, ts, strict=True):
        weight = m.weight if m.needs.x and packed is None else None
        t = t if m.needs.saves_t else None
        saved += SavedMember(weight, m.lora_a, m.lora_b, m.gate, m.seed, t)
    ctx.save_for_backward(*saved)


def _backward(
    ctx, dys: Sequence[Tensor | None], run: GroupBackward
) -> tuple[Tensor | None, list[Grads]]:
    refuse_create_graph()
    x, *flat = ctx.saved_tensors
    saved = [SavedMember(*row) for row in rows_of(flat, SavedMember)]
    members = [
        Member(packed or s.weight, s.lora_a, s.lora_b, s.gate, None, s.seed, scale, s.t, needs)
        for s, packed, scale, needs in zip(saved, ctx.packed, ctx.scales, ctx.needs, strict=True)
    ]
    dy = next((dy for dy in dys if dy is not None), None)
    with own_dtypes(dy, dy is not None and any(ctx.packed)):
        return run(dys, x, members, ctx.dropout_p)


class MaskedLoraLinearGroupFunction(torch.autograd.Function):
    """The group as an autograd function: impl, p, scales, x; ``MemberTensors`` of each member."""

    @staticmethod
    def forward(ctx, impl, dropout_p, scales, x, *flat):
        """Compute the tuple of y and keep the tensors that backward will read."""
        _impl, _dropout_p, _scales, wants_x, *wanted = ctx.needs_input_grad
        members = []
        for tensors, flags, scale in zip(
            rows_of(flat, MemberTensors), rows_of(wanted, MemberTensors), scales, strict=True
        ):
            *parameters, _seed = flags
            members.append(Member(*tensors, scale, needs=Needs(wants_x, *parameters)))
        ys, ts = _forward(impl, x, members, dropout_p)
        _save(ctx, impl, x, members, ts, dropout_p)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        """Return one dx, then the gradients of each member in the order of the arguments."""
        dx, grads = _backward(ctx, dys, paths.group_path(ctx.impl).backward)
        flat = []
        for g in grads:
            flat += MemberTensors(g.weight, g.lora_a, g.lora_b, g.gate, g.bias, seed=None)
        no_impl = no_dropout_p = no_scales = None
        return (no_impl, no_dropout_p, no_scales, dx, *flat)


def absent(x: Tensor) -> Tensor:
    """Make the stand-in for a missing tensor: autograd takes no list that holds ``None``."""
    return x.new_empty(0)


def _members(weights, lora_as, lora_bs, gates, biases, seeds, scales) -> list[Member]:
    members = []
    for i, scale in enumerate(scales):
        optional = (lora_as[i], lora_bs[i], gates[i], biases[i])
        # Not numel() == 0: an adapter of a layer with K = 0 or N = 0 has that too.
        a, b, gate, bias = (None if tensor.shape == (0,) else tensor for tensor in optional)
        seed = seeds[i : i + 1] if seeds is not None and a is not None else None
        members.append(Member(weights[i], a, b, gate, bias, seed, scale))
    return members


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

    A missing A, B, γ or bias is an empty tensor (``absent``). ``impl`` has no default: for an op
    with lists, autograd wants as many gradients as arguments were given.
    """
    members = _members(weights, lora_as, lora_bs, gates, biases, seeds, scales)
    ys, ts = _forward(impl, x, members, dropout_p)
    # The outputs of an op must not share memory: the t's are slices of one GEMM.
    thin = eager.thin_dtype(x)
    return ys + [x.new_empty(x.shape[0], 0, dtype=thin) if t is None else t.clone() for t in ts]


@masked_lora_linear_group.register_fake
def _(x, weights, lora_as, lora_bs, gates, biases, seeds, scales, dropout_p, impl):
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    ranks = [a.shape[0] if a.dim() == 2 else 0 for a in lora_as]
    return ys + [x.new_empty(x.shape[0], r, dtype=eager.thin_dtype(x)) for r in ranks]


def _setup_context(ctx, inputs, output):
    x, weights, lora_as, lora_bs, gates, biases, seeds, scales, dropout_p, impl = inputs
    members = _members(weights, lora_as, lora_bs, gates, biases, seeds, scales)
    ts = output[len(members) :]
    ctx.mark_non_differentiable(*ts)
    # ctx.needs_input_grad is flat here and nested in backward; requires_grad says the same in both.
    columns = (weights, lora_as, lora_bs, gates, biases)
    wanted = zip(*([t.requires_grad for t in column] for column in columns), strict=True)
    members = [
        m._replace(needs=Needs(x.requires_grad, *row))
        for m, row in zip(members, wanted, strict=True)
    ]
    open_ts = (t if m.is_open else None for m, t in zip(members, ts, strict=True))
    _save(ctx, impl, x, members, open_ts, dropout_p)


def _op_backward(ctx, d_outputs):
    by_op = partial(traced.group_backward, ctx.impl)
    run = group.backward if ctx.impl == "eager" else by_op
    dx, grads = _backward(ctx, d_outputs[: len(ctx.scales)], run)
    by_argument = (
        [g.weight for g in grads],
        [g.lora_a for g in grads],
        [g.lora_b for g in grads],
        [g.gate for g in grads],
        [g.bias for g in grads],
    )
    no_seeds = no_scales = no_dropout_p = no_impl = None
    return (dx, *by_argument, no_seeds, no_scales, no_dropout_p, no_impl)


masked_lora_linear_group.register_autograd(_op_backward, setup_context=_setup_context)

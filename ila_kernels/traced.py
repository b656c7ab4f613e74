"""The backward passes that launch Triton kernels, as ops with fakes, for compiled graphs.

``torch.compile`` traces the backward formula of an op on tensors without data, and no kernel can
run on those. Library calls can be traced and compiled with their surroundings, so ``impl="eager"``
needs no op here, and neither do the plain autograd functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ila_kernels.eager import Grads, Needs
from ila_kernels.group import NO_NEEDS, Member, rows_of
from ila_kernels.paths import group_path, linear_path

# The list that an op returns holds no None: these ops return the wanted gradients only, in order.


@torch.library.custom_op("ila::masked_lora_linear_backward", mutates_args=())
def _linear(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    t: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Sequence[bool],
    impl: str,
) -> list[Tensor]:
    arguments = (dy, x, weight, lora_a, lora_b, gate, t, seed, scale, dropout_p)
    return _made(linear_path(impl).backward(*arguments, Needs(*needs)))


@_linear.register_fake
def _(dy, x, weight, lora_a, lora_b, gate, t, seed, scale, dropout_p, needs, impl):
    like = next((s for s in (x, weight, t) if s is not None), dy)
    return _made(_empty(dy, like, lora_a, lora_b, gate, lora_a.shape[1], Needs(*needs)))


def _empty(dy, like, lora_a, lora_b, gate, k, needs: Needs) -> Grads:
    """Make gradients without data, in the shapes and dtypes of the kernels' results."""
    m, n = dy.shape
    return Grads(
        like.new_empty(m, k) if needs.x else None,
        like.new_empty(n, k) if needs.weight else None,
        lora_a.new_empty(lora_a.shape) if needs.lora_a else None,
        lora_b.new_empty(lora_b.shape) if needs.lora_b else None,
        gate.new_empty(gate.shape) if needs.gate else None,
        like.new_empty(n) if needs.bias else None,
    )


def _made(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in grads if g is not None]


def _placed(made: Iterator[Tensor], needs: Needs) -> Grads:
    return Grads(*(next(made) if wanted else None for wanted in needs))


def linear_backward(
    impl: str, *saved: Tensor | None, scale: float, dropout_p: float, needs: Needs
) -> Grads:
    """Run the backward of ``impl`` by its op; ``saved`` is dy, x, W, A, B, γ, t, seed."""
    made = torch.ops.ila.masked_lora_linear_backward(*saved, scale, dropout_p, list(needs), impl)
    return _placed(iter(made), needs)


@torch.library.custom_op("ila::masked_lora_linear_group_backward", mutates_args=())
def _group(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    ts: Sequence[Tensor | None],
    scales: Sequence[float],
    dropout_p: float,
    needs: Sequence[bool],
    impl: str,
) -> list[Tensor]:
    columns = (weights, lora_as, lora_bs, gates, seeds, scales, ts, rows_of(needs, Needs))
    members = [
        Member(w, a, b, gate, None, seed, scale, t, Needs(*flags))
        for w, a, b, gate, seed, scale, t, flags in zip(*columns, strict=True)
    ]
    dx, grads = group_path(impl).backward(dys, x, members, dropout_p)
    return _made((dx, *(g for member in grads for g in member)))


@_group.register_fake
def _(dys, x, weights, lora_as, lora_bs, gates, seeds, ts, scales, dropout_p, needs, impl):
    like = next(s for s in (x, *weights, *ts, *dys) if s is not None)
    dx, flat = None, []
    for dy, w, a, b, gate, flags in zip(
        dys, weights, lora_as, lora_bs, gates, rows_of(needs, Needs), strict=True
    ):
        if dy is None:
            continue
        n = Needs(*flags)
        if n.x and dx is None:
            dx = like.new_empty(dy.shape[0], w.shape[1])
        k = x.shape[1] if n.weight else 0
        flat += _empty(dy, like, a, b, gate, k, n._replace(x=False))
    return _made((dx, *flat))


def group_backward(
    impl: str,
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    members: Sequence[Member],
    dropout_p: float,
) -> tuple[Tensor | None, list[Grads]]:
    """Run the group's backward of ``impl`` by its op."""
    made = iter(
        torch.ops.ila.masked_lora_linear_group_backward(
            list(dys),
            x,
            [m.weight for m in members],
            [m.lora_a for m in members],
            [m.lora_b for m in members],
            [m.gate for m in members],
            [m.seed for m in members],
            [m.t for m in members],
            [m.scale for m in members],
            dropout_p,
            [wanted for m in members for wanted in m.needs],
            impl,
        )
    )
    used = [m.needs if dy is not None else NO_NEEDS for dy, m in zip(dys, members, strict=True)]
    dx = next(made) if any(n.x for n in used) else None
    return dx, [_placed(made, n._replace(x=False)) for n in used]

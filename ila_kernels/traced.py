"""The backward passes of ``impl="triton"`` as ops, with fakes: what a traced graph can hold.

``torch.compile`` traces the backward formula of an op on tensors without data, and no kernel can be
launched on those. Library calls are traced into and compiled with what surrounds them, so
``impl="eager"`` needs none of this, and neither do the plain autograd functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ila_kernels.eager import Grads, Needs
from ila_kernels.group import NO_NEEDS, Member

# A list of an op holds no None: of the gradients it returns those that are wanted, in order.


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
) -> list[Tensor]:
    from ila_kernels.kernels import linear

    arguments = (dy, x, weight, lora_a, lora_b, gate, t, seed, scale, dropout_p)
    return _made(linear.backward(*arguments, Needs(*needs)))


@_linear.register_fake
def _(dy, x, weight, lora_a, lora_b, gate, t, seed, scale, dropout_p, needs):
    like = next((s for s in (x, weight, t) if s is not None), dy)
    return _made(_empty(dy, like, lora_a, lora_b, gate, lora_a.shape[1], Needs(*needs)))


def _empty(dy, like, lora_a, lora_b, gate, k, needs: Needs) -> Grads:
    """Gradients without data, of the shapes and dtypes that the kernels give them."""
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


def linear_backward(*saved: Tensor | None, scale: float, dropout_p: float, needs: Needs) -> Grads:
    """``kernels.linear.backward`` by its op: dy, x, W, A, B, γ, t, seed."""
    made = torch.ops.ila.masked_lora_linear_backward(*saved, scale, dropout_p, list(needs))
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
) -> list[Tensor]:
    from ila_kernels.kernels import group

    columns = (weights, lora_as, lora_bs, gates, [None] * len(scales), seeds, scales, ts)
    members = [Member(*row) for row in zip(*columns, _by_member(needs), strict=True)]
    dx, grads = group.backward(dys, x, members, dropout_p)
    return _made((dx, *(g for member in grads for g in member)))


@_group.register_fake
def _(dys, x, weights, lora_as, lora_bs, gates, seeds, ts, scales, dropout_p, needs):
    like = next(s for s in (x, *weights, *ts, *dys) if s is not None)
    dx, flat = None, []
    for dy, w, a, b, gate, n in zip(
        dys, weights, lora_as, lora_bs, gates, _by_member(needs), strict=True
    ):
        if dy is None:
            continue
        if n.x and dx is None:
            dx = like.new_empty(dy.shape[0], w.shape[1])
        k = x.shape[1] if n.weight else 0
        flat += _empty(dy, like, a, b, gate, k, n._replace(x=False))
    return _made((dx, *flat))


def _by_member(needs: Sequence[bool]) -> list[Needs]:
    return [Needs(*needs[i : i + 6]) for i in range(0, len(needs), 6)]


def group_backward(
    dys: Sequence[Tensor | None], x: Tensor | None, members: Sequence[Member], dropout_p: float
) -> tuple[Tensor | None, list[Grads]]:
    """``kernels.group.backward`` by its op."""
    names = ("weight", "lora_a", "lora_b", "gate", "seed", "t", "scale")
    columns = ([getattr(m, name) for m in members] for name in names)
    flat = [wanted for m in members for wanted in m.needs]
    ops = torch.ops.ila
    made = iter(ops.masked_lora_linear_group_backward(list(dys), x, *columns, dropout_p, flat))
    used = [m.needs if dy is not None else NO_NEEDS for dy, m in zip(dys, members, strict=True)]
    dx = next(made) if any(n.x for n in used) else None
    return dx, [_placed(made, n._replace(x=False)) for n in used]

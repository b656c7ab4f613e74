"""The backward passes of ``impl="triton"`` as ops, with fakes: what a traced graph can hold.

``torch.compile`` traces the backward formula of an op on tensors without data, and no kernel can be
launched on those. Library calls are traced into and compiled with what surrounds them, so
``impl="eager"`` needs none of this, and neither do the plain autograd functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ila_kernels.eager import Grads, Needs
from ila_kernels.group import Member

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
    return _wanted(linear.backward(*arguments, Needs(*needs)))


@_linear.register_fake
def _(dy, x, weight, lora_a, lora_b, gate, t, seed, scale, dropout_p, needs):
    like = next((s for s in (x, weight, t) if s is not None), dy)
    grads = _empty(dy, like, lora_a, lora_b, gate, lora_a.shape[1], Needs(*needs))
    return _wanted(grads)


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


def _wanted(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in grads if g is not None]


def linear_backward(dy, x, weight, lora_a, lora_b, gate, t, seed, scale, dropout_p, needs) -> Grads:
    """``kernels.linear.backward`` by its op."""
    tensors = (dy, x, weight, lora_a, lora_b, gate, t, seed)
    grads = iter(torch.ops.ila.masked_lora_linear_backward(*tensors, scale, dropout_p, list(needs)))
    return Grads(*(next(grads) if wanted else None for wanted in needs))


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

    columns = zip(weights, lora_as, lora_bs, gates, seeds, scales, strict=True)
    members = [Member(w, a, b, gate, None, seed, s) for w, a, b, gate, seed, s in columns]
    dx, grads = group.backward(dys, x, members, ts, dropout_p, _by_member(needs))
    return _wanted((dx, *(g for member in grads for g in member)))


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
    return _wanted((dx, *flat))


def _by_member(needs: Sequence[bool]) -> list[Needs]:
    return [Needs(*needs[i : i + 6]) for i in range(0, len(needs), 6)]


def group_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    members: Sequence[Member],
    ts: Sequence[Tensor | None],
    dropout_p: float,
    needs: Sequence[Needs],
) -> tuple[Tensor | None, list[Grads]]:
    """``kernels.group.backward`` by its op."""
    names = ("weight", "lora_a", "lora_b", "gate", "seed")
    columns = ([getattr(m, name) for m in members] for name in names)
    scales, flat = [m.scale for m in members], [wanted for n in needs for wanted in n]
    rest = (list(ts), scales, dropout_p, flat)
    out = iter(torch.ops.ila.masked_lora_linear_group_backward(list(dys), x, *columns, *rest))
    used = [
        n._replace(x=False) if dy is not None else Needs(*[False] * 6)
        for dy, n in zip(dys, needs, strict=True)
    ]
    has_dx = any(n.x and dy is not None for dy, n in zip(dys, needs, strict=True))
    dx = next(out) if has_dx else None
    return dx, [Grads(*(next(out) if wanted else None for wanted in n)) for n in used]

"""Several masked LoRA linears of one x (q/k/v, or gate/up): one read of x, one dx.

    T = x̂ [A₁; A₂; …]ᵀ                     dx = Σ dyᵢ Wᵢ + [γ₁α₁u₁, γ₂α₂u₂, …] [A₁; A₂; …]
    [dA₁; dA₂; …] = diag(γα) [u₁, u₂, …]ᵀ x̂

Apart, n linears read x 2n times forward and n times for dA, and autograd adds n gradients of shape
(M, K). Together they read x n + 1 times forward and once for dA, and every dyᵢ Wᵢ accumulates into
the same dx. With dropout each member has its own mask, as n separate layers have, so T and dA are
computed member by member.

A member without an adapter (closed) is a bare linear that still shares dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ila_kernels import eager
from ila_kernels.eager import Grads, Needs
from ila_kernels.products import add_product, folded
from ila_kernels.quant import PackedWeight, input_grad, linear

NO_NEEDS = Needs(x=False, weight=False, lora_a=False, lora_b=False, gate=False, bias=False)
NO_GRADS = Grads(x=None, weight=None, lora_a=None, lora_b=None, gate=None, bias=None)

T = TypeVar("T")


def rows_of(flat: Sequence[T], kind: type[NamedTuple]) -> list[Sequence[T]]:
    """Cut a flat sequence into rows as long as ``kind`` has fields, one row a member."""
    width = len(kind._fields)
    return [flat[i : i + width] for i in range(0, len(flat), width)]


class Member(NamedTuple):
    """One linear of a group: W (N, K), A (R, K), B (N, R), γ (1 element), bias (N,), seed (1,).

    Backward also reads t (M, R) for dB or dγ, and ``needs``; it does not read the bias.
    """

    weight: Tensor | PackedWeight
    lora_a: Tensor | None
    lora_b: Tensor | None
    gate: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    scale: float
    t: Tensor | None = None
    needs: Needs = NO_NEEDS

    @property
    def is_open(self) -> bool:
        """Tell whether this member has an adapter."""
        return self.lora_a is not None


def shrink_all(x: Tensor, members: Sequence[Member], dropout_p: float) -> list[Tensor | None]:
    """Compute every t = x̂ Aᵀ; without dropout by one GEMM over the concatenated A's."""
    adapters = [m for m in members if m.is_open]
    if not adapters:
        return [None] * len(members)
    if dropout_p > 0.0:
        return [
            eager.shrink(x, m.lora_a, m.seed, dropout_p) if m.is_open else None for m in members
        ]
    thin = eager.thin_dtype(x)
    stacked = torch.cat([m.lora_a.to(thin) for m in adapters])
    parts = iter(
        torch.mm(x.to(thin), stacked.t()).split([m.lora_a.shape[0] for m in adapters], dim=1)
    )
    return [next(parts) if m.is_open else None for m in members]


def forward(
    x: Tensor, members: Sequence[Member], dropout_p: float
) -> tuple[list[Tensor], list[Tensor | None]]:
    """x (M, K) -> every y (M, Nᵢ), and every t (M, Rᵢ), ``None`` for a closed member."""
    ts = shrink_all(x, members, dropout_p)
    ys = []
    for m, t in zip(members, ts, strict=True):
        if t is None:
            ys.append(linear(x, m.weight, m.bias))
        else:
            ys.append(eager.expand(x, m.weight, t, m.lora_b, m.gate, m.bias, m.scale))
    return ys, ts


def shared_input_grad(
    dys: Sequence[Tensor | None],
    us: Sequence[Tensor | None],
    members: Sequence[Member],
    dropout_p: float,
) -> Tensor | None:
    """Compute dx (M, K), accumulated in place over the members whose output was used."""
    used = [(dy, m) for dy, m in zip(dys, members, strict=True) if dy is not None]
    adapted = [(u, m) for u, m in zip(us, members, strict=True) if u is not None]
    if not used:
        return None
    first = adapted and all(eager.base_adds(dy, m.weight, m.weight.shape[1]) for dy, m in used)
    dx = add_base_grads(
        _lowrank_dx(adapted, dropout_p).to(used[0][0].dtype) if first else None, used
    )
    if first or not adapted:
        return dx
    if dropout_p > 0.0:
        return dx.add_(_lowrank_dx(adapted, dropout_p))
    return add_product(dx, *stacked(adapted), 1.0, None)


def add_base_grads(dx: Tensor | None, used: Sequence[tuple[Tensor, Member]]) -> Tensor:
    """dx += Σ dyᵢ Wᵢ, in place; ``None`` stands for zeros."""
    for dy, m in used:
        if dx is None:
            dx = input_grad(dy, m.weight)
        elif isinstance(m.weight, PackedWeight):
            dx.add_(m.weight.input_grad(dy))
        else:
            # Backward under autocast: `mm` has rounded dx, and an in-place addmm casts nothing.
            dx.addmm_(dy.to(dx.dtype), m.weight.to(dx.dtype))
    return dx


def stacked(adapted: Sequence[tuple[Tensor, Member]]) -> tuple[Tensor, Tensor]:
    """Put every u (M, ΣR) and every γα A (ΣR, K) of the group beside each other."""
    adapters = [folded(m.lora_a, m.scale, m.gate, u.dtype) for u, m in adapted]
    return torch.cat([u for u, _ in adapted], dim=1), torch.cat(adapters)


def _lowrank_dx(adapted: Sequence[tuple[Tensor, Member]], dropout_p: float) -> Tensor:
    """Σ γα (u A) ⊙ keep/(1−p), (M, K), each under the mask of its member."""
    if dropout_p == 0.0:
        return torch.mm(*stacked(adapted))
    total = None
    for u, m in adapted:
        part, factor = eager.lowrank_dx(u, m.lora_a, m.gate, m.seed, m.scale, dropout_p)
        total = part.mul_(factor) if total is None else total.add_(part, alpha=factor)
    return total


def shared_grad_a(
    x: Tensor | None, us: Sequence[Tensor | None], members: Sequence[Member]
) -> list[Tensor | None]:
    """Compute each wanted dA = γα uᵀ x (R, K) from one read of x; not for dropout."""
    wanted = [u is not None and m.needs.lora_a for u, m in zip(us, members, strict=True)]
    if not any(wanted):
        return [None] * len(members)
    stacked = torch.cat([u for u, wants in zip(us, wanted, strict=True) if wants], dim=1)
    product = torch.mm(stacked.t(), x.to(stacked.dtype))
    ranks = [m.lora_a.shape[0] for m, wants in zip(members, wanted, strict=True) if wants]
    parts = iter(product.split(ranks))
    return [_scaled(next(parts), m) if w else None for m, w in zip(members, wanted, strict=True)]


def _scaled(part: Tensor, m: Member) -> Tensor:
    da = folded(part, m.scale, m.gate, m.lora_a.dtype)
    return da.clone() if da is part else da  # a gradient holds no memory but its own


def backward(
    dys: Sequence[Tensor | None], x: Tensor | None, members: Sequence[Member], dropout_p: float
) -> tuple[Tensor | None, list[Grads]]:
    """Compute dx and the parameter gradients of every member (their ``Grads.x`` is None)."""
    makes_u = [
        dy is not None and m.is_open and m.needs.makes_u for dy, m in zip(dys, members, strict=True)
    ]
    us = [
        eager.expand_grad(dy, m.lora_b) if makes else None
        for dy, m, makes in zip(dys, members, makes_u, strict=True)
    ]
    dx = shared_input_grad(dys, us, members, dropout_p) if members[0].needs.x else None
    alone = dropout_p > 0.0 or sum(m.needs.lora_a for m in members) < 2
    das = [None] * len(members) if alone else shared_grad_a(x, us, members)
    rows = zip(dys, us, das, members, strict=True)
    return dx, [
        NO_GRADS if dy is None else _own(dy, x, u, da, m, dropout_p) for dy, u, da, m in rows
    ]


def _own(
    dy: Tensor, x: Tensor | None, u: Tensor | None, da: Tensor | None, m: Member, dropout_p: float
) -> Grads:
    db = dgate = None
    if m.is_open:
        needs = m.needs._replace(lora_a=m.needs.lora_a and da is None)
        own, db, dgate = eager.adapter_grads(
            dy, x, u, m.t, m.lora_a, m.lora_b, m.gate, m.seed, m.scale, dropout_p, needs
        )
        da = own if da is None else da
    dweight = torch.mm(dy.t(), x) if m.needs.weight else None
    return Grads(None, dweight, da, db, dgate, dy.sum(0) if m.needs.bias else None)

"""Several masked LoRA linears of one x on the Triton kernels; the same functions as ``group`` has.

    forward    shrink for all A's at once, joined_gemm               x read n + 1 times
    backward   of each: grad_out, lowrank_gemm onto the same dx; then every dA at once

All dA's come from one pass over x too, under dropout each with a mask of its own.

Apart, autograd adds n gradients of shape (M, K): 3·M·K elements for each further member. Here each
further one reads dx where it writes it anyway: M·K elements, and no second (M, K) tensor.

dx in 16 bits is rounded once for each member; apart it is 2n − 1 times, the sums included. With u
half the dtype's eps, n roundings lose at most n·u of the largest partial sum; the budget of
``testing.assert_within_rounding`` is 4·u of the result, and as much again as eager loses of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ila_kernels.eager import Grads
from ila_kernels.group import NO_GRADS, Member
from ila_kernels.kernels.joined_gemm import outputs
from ila_kernels.kernels.launch import seed_number
from ila_kernels.kernels.linear import check_dtype, grads_of_a, input_grad, parameter_grads
from ila_kernels.kernels.shrink import shrink


def shrink_all(x: Tensor, members: Sequence[Member], dropout_p: float) -> list[Tensor | None]:
    """Compute every t = x̂ Aᵀ of the group in one pass over x, each under its member's mask."""
    adapters = [m for m in members if m.is_open]
    seeds = [seed_number(m.seed) for m in adapters] if dropout_p > 0.0 else None
    ts = iter(shrink(x, [m.lora_a for m in adapters], seeds, dropout_p))
    return [next(ts) if m.is_open else None for m in members]


def forward(
    x: Tensor,
    members: Sequence[Member],
    dropout_p: float,
    *,
    products: Callable[..., list[Tensor]] = outputs,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """x (M, K) -> every y (M, Nᵢ), and every t (M, Rᵢ), ``None`` for a closed member.

    ``products`` computes the y of every open member from its t.
    """
    check_dtype(x.dtype)
    with torch.cuda.device(x.device):
        ts = shrink_all(x, members, dropout_p)
        adapted = [(m, t) for m, t in zip(members, ts, strict=True) if t is not None]
        made = iter(products(x, [m for m, _ in adapted], [t for _, t in adapted]))
        ys = [
            F.linear(x, m.weight, m.bias) if t is None else next(made)
            for m, t in zip(members, ts, strict=True)
        ]
    return ys, ts


def add_input_grad(
    dx: Tensor | None, dy: Tensor, u: Tensor | None, m: Member, dropout_p: float
) -> Tensor:
    """dx (M, K) += dy W + γα (u A) ⊙ keep/(1−p), in place; ``None`` stands for zeros."""
    if u is not None:
        return input_grad(dy, u, m, dropout_p, out=dx)
    if dx is not None:
        return dx.addmm_(dy, m.weight)
    # Given `out`, mm keeps its dtype under autocast too.
    return torch.mm(dy, m.weight, out=dy.new_empty(dy.shape[0], m.weight.shape[1]))


def backward(
    dys: Sequence[Tensor | None], x: Tensor | None, members: Sequence[Member], dropout_p: float
) -> tuple[Tensor | None, list[Grads]]:
    """dx of the group and the parameter gradients of every member (their ``Grads.x`` is None)."""
    saved = (x, *(m.weight for m in members), *(m.t for m in members), *dys)
    dtype = next((s.dtype for s in saved if s is not None), None)
    dx, us, grads = None, [], []
    for dy, m in zip(dys, members, strict=True):
        if dy is None:
            us.append(None)
            grads.append(NO_GRADS)
            continue
        with torch.cuda.device(dy.device):
            dy = dy.to(dtype)
            u, own = parameter_grads(dy, x, m, dropout_p, with_da=False)
            us.append(u)
            grads.append(own)
            if m.needs.x:
                dx = add_input_grad(dx, dy, u, m, dropout_p)
    if x is not None and any(u is not None for u in us):
        with torch.cuda.device(x.device):
            das = grads_of_a(x, us, members, dropout_p)
        grads = [own._replace(lora_a=da) for own, da in zip(grads, das, strict=True)]
    return dx, grads

"""The method of the well-known fast trainers, in our own words: the base GEMM, then ``addmm``.

    t  = x Aᵀ         y  = x Wᵀ + s t Bᵀ          (the update lands in y by one addmm)
    u  = dy B         dx = dy W + s u A            dA = s uᵀ x      dB = s dyᵀ t

An ``autograd.Function`` a layer saves x, A and B; adapters are rounded to the dtype of x, no
dropout, no gate. t is computed again in backward, as there. A contestant of the benchmarks and
nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class AddmmLora(torch.autograd.Function):
    """x (M, K), W (N, K), A (R, K), B (N, R), s -> y (M, N); W is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        y = F.linear(x, weight)
        return y.addmm_(x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, a, b = ctx.saved_tensors
        thin_a, thin_b, scale = a.to(x.dtype), b.to(x.dtype), ctx.scale
        t, u = x @ thin_a.t(), dy @ thin_b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(u, thin_a, alpha=scale)
        da = (u.t() @ x).mul_(scale).to(a.dtype)
        db = (dy.t() @ t).mul_(scale).to(b.dtype)
        return dx, None, da, db, None


def addmm_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same for x (..., K)."""
    y = AddmmLora.apply(x.reshape(-1, x.shape[-1]), weight, a, b, scale)
    return y.view(*x.shape[:-1], y.shape[-1])

"""Products with one R-thin side, for library GEMMs: where α and γ go, and where they are rounded.

α goes into a GEMM's α or β where it can, and else, like γ, which only the device knows, into a
tensor with R rows or columns: no pass over an (M, N) tensor, and no gate read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def folded(thin: Tensor, factor: float, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``factor · γ · thin`` rounded once to ``dtype``; an R-thin tensor, never (M, N) or (M, K)."""
    if gate is None:
        if factor == 1.0:
            return thin if thin.dtype == dtype else thin.to(dtype)
        wide = torch.promote_types(thin.dtype, dtype)
        return thin.to(wide).mul(factor).to(dtype)
    wide = torch.promote_types(torch.promote_types(thin.dtype, dtype), torch.float32)
    return (thin.to(wide) * (gate.to(wide) * factor)).to(dtype)


def add_product(out: Tensor, p: Tensor, q: Tensor, factor: float, gate: Tensor | None) -> Tensor:
    """out += factor · γ · p q, in place. p (M, R) in the thin dtype, q (R, ·) in any."""
    if p.dtype != out.dtype:
        return out.add_(torch.mm(p, folded(q, factor, gate, p.dtype)))
    if gate is None:
        return out.addmm_(p, folded(q, 1.0, None, p.dtype), alpha=factor)
    return out.addmm_(p, folded(q, factor, gate, p.dtype))


def unscaled(p: Tensor, q: Tensor, factor: float, gate: Tensor | None) -> tuple[Tensor, float]:
    """factor · γ · p q (M, ·) as a new tensor and the β that the base GEMM multiplies it with.

    β costs no pass over the tensor. Not for fp16, where p q without its factor may overflow, and
    not for γ, which only the device knows.
    """
    if gate is None and p.dtype != torch.float16:
        return torch.mm(p, folded(q, 1.0, None, p.dtype)), factor
    return torch.mm(p, folded(q, factor, gate, p.dtype)), 1.0


def update_first(
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    factor: float,
    gate: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """P Q + bias + factor · γ · U V. P (M, K), Q (K, N), U (M, R) of one dtype, V in any."""
    beta = 1.0
    if bias is None:
        update, beta = unscaled(u, v, factor, gate)
    else:
        alpha, folding = (factor, 1.0) if gate is None else (1.0, factor)
        update = torch.addmm(bias, u, folded(v, folding, gate, u.dtype), alpha=alpha)
    return update.addmm_(p, q, beta=beta)


def scaled_product(
    p: Tensor, q: Tensor, factor: float, gate: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """factor · γ · p q in ``dtype``, for the R-thin gradients dA and dB."""
    if gate is None and p.dtype == dtype:
        return p.new_empty(p.shape[0], q.shape[1]).addmm_(p, q, beta=0.0, alpha=factor)
    return folded(torch.mm(p, q), factor, gate, dtype)

"""out = s·γ · Σ_c partial[c], and ⟨Σ_c partial[c], t⟩: the second half of a sum over programs.

Programs that share a result write fp32 partial sums, and this kernel adds them in a fixed order:
the same bits every time, which float atomics do not give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import Tile
from ila_kernels.kernels.launch import Launch

TILE = Tile(m=1024, n=1, k=1, r=1, warps=4, stages=1)  # no products: registers for 8 values a lane


@triton.jit
def _sum_partials(
    partial_ptr, out_ptr, gate_ptr, t_ptr, inner_ptr, size, count, scale, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for c in range(0, count):
        total += tl.load(partial_ptr + c.to(tl.int64) * size + i, mask=inside, other=0.0)
    if t_ptr is not None:
        t = tl.load(t_ptr + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(inner_ptr + tl.program_id(0), tl.sum(total * t))
    factor = scale
    if gate_ptr is not None:
        factor = scale * tl.load(gate_ptr).to(tl.float32)
    tl.store(out_ptr + i, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


def launch(
    partial: Tensor,
    out: Tensor,
    gate: Tensor | None,
    t: Tensor | None,
    inner: Tensor | None,
    scale: float,
) -> Launch:
    """Describe the launch that adds partial (C, ...) over its first axis."""
    arguments = {
        "partial_ptr": partial, "out_ptr": out, "gate_ptr": gate, "t_ptr": t, "inner_ptr": inner,
        "size": out.numel(), "count": partial.shape[0], "scale": float(scale), "BLOCK": TILE.m,
    }  # fmt: skip
    return Launch(_sum_partials, (triton.cdiv(out.numel(), TILE.m),), arguments, TILE)


def sum_partials(
    partial: Tensor, dtype: torch.dtype, scale: float = 1.0, gate: Tensor | None = None
) -> Tensor:
    """Partial (C, ...) fp32 -> s·γ Σ_c in ``dtype``, shape (...)."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    launch(partial, out, gate, None, None, scale).run()
    return out


def sum_partials_with_inner(
    partial: Tensor, t: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Partial (C, M, R) fp32, t (M, R) contiguous -> Σ_c in ``dtype``, and ⟨Σ_c, t⟩ as fp32 ()."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    blocks = triton.cdiv(out.numel(), TILE.m)
    inner = torch.empty(blocks, dtype=torch.float32, device=partial.device)
    launch(partial, out, None, t, inner, 1.0).run()
    return out, inner.sum()

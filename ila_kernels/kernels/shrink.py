"""t = x̂ Aᵀ with x̂ = x ⊙ keep / (1 − p); A may be several adapters, one under the other.

One read of x for all of them: q/k/v apart read it three times, M·K elements each. The mask is
drawn in registers and A is rounded where it is loaded, so neither x̂ nor a cast A is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import shrink_tile
from ila_kernels.device import target_of
from ila_kernels.kernels.launch import TL_DTYPES, Launch, precision
from ila_kernels.kernels.philox import keep_tile, threshold


@triton.jit(do_not_specialize=["seed", "threshold"])
def _shrink(
    x_ptr, a_ptr, t_ptr, M, K, R, factor, seed, threshold,
    x_m, x_k, a_r, a_k, t_m,
    DROPOUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    in_m, in_r = (m < M)[:, None], (r < R)[None, :]
    x = x_ptr + m[:, None] * x_m + k.to(tl.int64)[None, :] * x_k
    a = a_ptr + k.to(tl.int64)[:, None] * a_k + r.to(tl.int64)[None, :] * a_r
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_tile = tl.load(x, mask=in_m & (k < K - k0)[None, :], other=0.0)
        a_tile = tl.load(a, mask=in_r & (k < K - k0)[:, None], other=0.0).to(DTYPE)
        if DROPOUT:
            keep = keep_tile(seed, threshold, m, k0, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0).to(DTYPE)
        acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
        x += tl.full((), BLOCK_K, tl.int64) * x_k
        a += tl.full((), BLOCK_K, tl.int64) * a_k
    tl.store(t_ptr + m[:, None] * t_m + r[None, :], (acc * factor).to(DTYPE), mask=in_m & in_r)


def launch(
    x: Tensor, a: Tensor, t: Tensor, seed: int | None, dropout_p: float, target: str
) -> Launch:
    """Describe the launch that writes t (M, R)."""
    (m, k), r = x.shape, a.shape[0]
    tile = shrink_tile(r, x.element_size())
    arguments = {
        "x_ptr": x, "a_ptr": a, "t_ptr": t, "M": m, "K": k, "R": r,
        "factor": 1.0 / (1.0 - dropout_p), "seed": seed or 0, "threshold": threshold(dropout_p),
        "x_m": x.stride(0), "x_k": x.stride(1), "a_r": a.stride(0), "a_k": a.stride(1),
        "t_m": t.stride(0), "DROPOUT": seed is not None, "DTYPE": TL_DTYPES[x.dtype],
        "PRECISION": precision(x.dtype), "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": tile.r,
    }  # fmt: skip
    return Launch(_shrink, (triton.cdiv(m, tile.m), triton.cdiv(r, tile.r)), arguments, tile)


def shrink(
    x: Tensor, adapters: list[Tensor], seed: int | None = None, dropout_p: float = 0.0
) -> Tensor:
    """x (M, K), adapters (Rᵢ, K) of any dtype -> t (M, Σ Rᵢ) in the dtype of x.

    Any strides. A seed masks x, with one mask for all adapters. fp32 accumulation, one rounding.
    """
    a = adapters[0] if len(adapters) == 1 else torch.cat(adapters)
    t = torch.empty(x.shape[0], a.shape[0], dtype=x.dtype, device=x.device)
    launch(x, a, t, seed, dropout_p, target_of(x)).run()
    return t

"""dA = γα uᵀ x̂ with x̂ = x ⊙ keep / (1 − p), the mask drawn again from its seed.

The library's way needs x̂ in memory: M·K elements written and read. Without dropout there is no x̂
to save, and the library's GEMM does dA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import ROWS_PER_PROGRAM, grad_tile
from ila_kernels.device import target_of
from ila_kernels.kernels.launch import TL_DTYPES, Launch, precision
from ila_kernels.kernels.partials import sum_partials
from ila_kernels.kernels.philox import keep_tile, threshold


@triton.jit(do_not_specialize=["seed", "threshold"])
def _grad_a(
    u_ptr, x_ptr, da_ptr, M, K, R, seed, threshold,
    u_m, u_r, x_m, x_k,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    k0, stretch = tl.program_id(0) * BLOCK_K, tl.program_id(1).to(tl.int64)
    k = k0.to(tl.int64) + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_k, in_r = (k < K)[None, :], r < R
    da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for step in range(0, ROWS, BLOCK_M):
        m = stretch * ROWS + step + tl.arange(0, BLOCK_M)
        in_m = m < M
        u = u_ptr + r[:, None] * u_r + m[None, :] * u_m
        u_tile = tl.load(u, mask=in_r[:, None] & in_m[None, :], other=0.0)
        x = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        x_tile = tl.load(x, mask=in_m[:, None] & in_k, other=0.0)
        keep = keep_tile(seed, threshold, m, k0, BLOCK_M, BLOCK_K)
        x_tile = tl.where(keep, x_tile, 0.0).to(DTYPE)
        da = tl.dot(u_tile, x_tile, da, input_precision=PRECISION)
    da_out = da_ptr + (stretch * R + r)[:, None] * K + k[None, :]
    tl.store(da_out, da, mask=in_r[:, None] & in_k)


def launch(u: Tensor, x: Tensor, da: Tensor, seed: int, dropout_p: float, target: str) -> Launch:
    """Describe the launch that writes the shares of dA (·, R, K)."""
    (m, k), r = x.shape, u.shape[1]
    tile = grad_tile(r, x.element_size(), target)
    arguments = {
        "u_ptr": u, "x_ptr": x, "da_ptr": da, "M": m, "K": k, "R": r, "seed": seed,
        "threshold": threshold(dropout_p), "u_m": u.stride(0), "u_r": u.stride(1),
        "x_m": x.stride(0), "x_k": x.stride(1), "ROWS": ROWS_PER_PROGRAM,
        "DTYPE": TL_DTYPES[x.dtype], "PRECISION": precision(x.dtype, target),
        "BLOCK_M": tile.m, "BLOCK_K": tile.n, "BLOCK_R": tile.r,
    }  # fmt: skip
    grid = (triton.cdiv(k, tile.n), da.shape[0], triton.cdiv(r, tile.r))
    return Launch(_grad_a, grid, arguments, tile)


def grad_a(
    u: Tensor,
    x: Tensor,
    seed: int,
    dropout_p: float,
    scale: float,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """u (M, R), x (M, K) of one dtype -> dA (R, K) in ``dtype``; the same bits every time."""
    stretches = triton.cdiv(x.shape[0], ROWS_PER_PROGRAM)
    da = torch.empty(stretches, u.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    launch(u, x, da, seed, dropout_p, target_of(x)).run()
    return sum_partials(da, dtype, scale / (1.0 - dropout_p), gate)

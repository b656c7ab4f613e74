"""dAᵢ = γᵢαᵢ uᵢᵀ x̂ᵢ with x̂ᵢ = x ⊙ keepᵢ / (1 − p), for one adapter or several of the same x.

One read of x for all of them. The library's way is a product and, for fp32 adapters over a 16-bit
x, a cast and a scaling of every dA; with dropout it also needs each x̂ in memory: M·K elements
written and read. Here a mask is drawn again from its seed, and the one rounding is that of ``sum``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import ADAPTERS_PER_PASS, grad_tile, rows_per_program
from ila_kernels.device import target_of
from ila_kernels.kernels.launch import TL_DTYPES, Launch, layout, precision, run_prepared
from ila_kernels.kernels.partials import Sum, add_shares
from ila_kernels.kernels.philox import keep_tile, numbered, threshold


@triton.jit(do_not_specialize=["M", "ROWS", "seed0", "seed1", "seed2", "threshold"])
def _grad_a(
    u_ptrs, x_ptr, da_ptrs, M, K, steps, ROWS, seed0, seed1, seed2, threshold, x_m, x_k,
    R_STEP: tl.constexpr, DROPOUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    k0, stretch = tl.program_id(0) * BLOCK_K, tl.program_id(1).to(tl.int64)
    k = k0.to(tl.int64) + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_k, seeds = (k < K)[None, :], (seed0, seed1, seed2)
    sums = (tl.zeros((BLOCK_R, BLOCK_K), tl.float32),) * len(u_ptrs)
    for step in range(0, ROWS, BLOCK_M):
        m = stretch * ROWS + step + tl.arange(0, BLOCK_M)
        in_m = m < M
        x = x_ptr + m[:, None] * x_m + k[None, :] * x_k
        x_tile = tl.load(x, mask=in_m[:, None] & in_k, other=0.0)
        more = ()
        for i in tl.static_range(len(u_ptrs)):
            # A product with a constant: the compiler then knows which rows of u start at 16 bytes.
            R = steps[i] * R_STEP
            u = u_ptrs[i] + m[None, :] * R + r[:, None]
            u_tile = tl.load(u, mask=(r < R)[:, None] & in_m[None, :], other=0.0)
            x_hat = x_tile
            if DROPOUT:
                keep = keep_tile(seeds[i], threshold, m, k0, BLOCK_M, BLOCK_K)
                x_hat = tl.where(keep, x_tile, 0.0).to(DTYPE)
            more += (tl.dot(u_tile, x_hat, sums[i], input_precision=PRECISION),)
        sums = more
    for i in tl.static_range(len(u_ptrs)):
        R = steps[i] * R_STEP
        da = da_ptrs[i] + (stretch * R + r)[:, None] * K + k[None, :]
        tl.store(da, sums[i], mask=(r < R)[:, None] & in_k)


class Adapter(NamedTuple):
    """Operands of one dA (R, K) of ``dtype``, beside x: u (M, R) contiguous, seed, α, γ."""

    u: Tensor
    seed: int | None
    scale: float
    gate: Tensor | None
    dtype: torch.dtype


def launch(
    us: Sequence[Tensor],
    x: Tensor,
    das: Sequence[Tensor],
    seeds: Sequence[int] | None,
    dropout_p: float,
    target: str,
) -> Launch:
    """Describe the launch that writes the shares of every dA (·, Rᵢ, K), of up to three."""
    (m, k), ranks = x.shape, [u.shape[1] for u in us]
    tile = grad_tile(max(ranks), x.element_size(), target, len(us))
    step = 1 if any(r % 8 for r in ranks) else 8
    arguments = {
        "u_ptrs": tuple(us), "x_ptr": x, "da_ptrs": tuple(das), "M": m, "K": k,
        "steps": tuple(r // step for r in ranks), "ROWS": rows_per_program(m, k),
        **numbered(seeds), "threshold": threshold(dropout_p),
        "x_m": x.stride(0), "x_k": x.stride(1), "R_STEP": step, "DROPOUT": seeds is not None,
        "DTYPE": TL_DTYPES[x.dtype], "PRECISION": precision(x.dtype, target),
        "BLOCK_M": tile.m, "BLOCK_K": tile.n, "BLOCK_R": tile.r,
    }  # fmt: skip
    grid = (-(-k // tile.n), das[0].shape[0], -(-max(ranks) // tile.r))
    return Launch(_grad_a, grid, arguments, tile)


def _run(
    us: Sequence[Tensor],
    x: Tensor,
    shares: Sequence[Tensor],
    seeds: Sequence[int] | None,
    dropout_p: float,
    target: str,
) -> None:
    key = (
        "grad_a", x.device, precision(x.dtype, target), layout(x, *us),
        None if seeds is None else tuple(seed < 2**31 for seed in seeds),
    )  # fmt: skip
    fresh = {
        "u_ptrs": tuple(us), "x_ptr": x, "da_ptrs": tuple(shares),
        **numbered(seeds), "threshold": threshold(dropout_p),
    }  # fmt: skip
    run_prepared(key, fresh, lambda: launch(us, x, shares, seeds, dropout_p, target))


def grad_a(x: Tensor, adapters: Sequence[Adapter], dropout_p: float) -> list[Tensor]:
    """Compute every dA (Rᵢ, K) from x (M, K) and the adapters; the same bits every time."""
    (m, k), target, found = x.shape, target_of(x), []
    stretches = -(-m // rows_per_program(m, k))
    wide = {"dtype": torch.float32, "device": x.device}
    for first in range(0, len(adapters), ADAPTERS_PER_PASS):
        part = adapters[first : first + ADAPTERS_PER_PASS]
        shares = [torch.empty(stretches, z.u.shape[1], k, **wide) for z in part]
        seeds = [z.seed for z in part] if dropout_p > 0.0 else None
        _run([z.u for z in part], x, shares, seeds, dropout_p, target)
        factors = [z.scale / (1.0 - dropout_p) for z in part]
        rows = zip(part, shares, factors, strict=True)
        found += add_shares([Sum(share, z.dtype, f, z.gate) for z, share, f in rows])[0]
    return found

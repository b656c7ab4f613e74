"""tᵢ = x̂ᵢ Aᵢᵀ with x̂ᵢ = x ⊙ keepᵢ / (1 − p), for one adapter or several of the same x.

One read of x for all of them: q/k/v apart read it three times, M·K elements each. A program loads a
tile of x once and multiplies it with every A, each under a mask of its own. Masks are drawn in
registers and A is rounded where it is loaded, so neither x̂ nor a cast A is ever stored; and every t
is a tensor of its own, so nothing is concatenated before or copied apart after.

Few rows at a large R split K: each part leaves a share of t in fp32, and ``partials`` adds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import ADAPTERS_PER_PASS, shrink_shares, shrink_tile
from ila_kernels.device import target_of
from ila_kernels.kernels.launch import TL_DTYPES, Launch, layout, precision, run_prepared
from ila_kernels.kernels.partials import Sum, add_shares
from ila_kernels.kernels.philox import keep_tile, numbered, threshold


@triton.jit(do_not_specialize=["M", "steps", "seed0", "seed1", "seed2", "threshold"])
def _shrink(
    x_ptr, a_ptrs, t_ptrs, ranks, M, K, steps, factor, seed0, seed1, seed2, threshold,
    x_m, x_k, a_r, a_k,
    DROPOUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    share = tl.program_id(2)
    first = share * steps * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    seeds = (seed0, seed1, seed2)
    in_m, wide_r = (m < M)[:, None], r.to(tl.int64)[None, :]
    x = x_ptr + m[:, None] * x_m + (first + k).to(tl.int64)[None, :] * x_k
    sums = (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),) * len(a_ptrs)
    for k0 in range(first, tl.minimum(first + steps * BLOCK_K, K), BLOCK_K):
        in_k = k < K - k0
        x_tile = tl.load(x, mask=in_m & in_k[None, :], other=0.0)
        more = ()
        for i in tl.static_range(len(a_ptrs)):
            a = a_ptrs[i] + (k0 + k).to(tl.int64)[:, None] * a_k[i] + wide_r * a_r[i]
            a_tile = tl.load(a, mask=in_k[:, None] & (r < ranks[i])[None, :], other=0.0).to(DTYPE)
            x_hat = x_tile
            if DROPOUT:
                keep = keep_tile(seeds[i], threshold, m, k0, BLOCK_M, BLOCK_K)
                x_hat = tl.where(keep, x_tile, 0.0).to(DTYPE)
            more += (tl.dot(x_hat, a_tile, sums[i], input_precision=PRECISION),)
        sums = more
        x += tl.full((), BLOCK_K, tl.int64) * x_k
    for i in tl.static_range(len(a_ptrs)):
        t = t_ptrs[i] + (share.to(tl.int64) * M + m)[:, None] * ranks[i] + r[None, :]
        total = (sums[i] * factor).to(t_ptrs[i].dtype.element_ty)
        tl.store(t, total, mask=in_m & (r < ranks[i])[None, :])


def launch(
    x: Tensor,
    adapters: Sequence[Tensor],
    ts: Sequence[Tensor],
    seeds: Sequence[int] | None,
    dropout_p: float,
    target: str,
) -> Launch:
    """Describe the launch that writes every t (M, Rᵢ), contiguous, of up to three adapters.

    With a first axis, (parts, M, Rᵢ), each t takes the shares of so many parts of K.
    """
    (m, k), ranks = x.shape, tuple(a.shape[0] for a in adapters)
    tile = shrink_tile(m, max(ranks), x.element_size(), target, len(ranks), seeds is not None)
    parts = ts[0].shape[0] if ts[0].dim() == 3 else 1
    arguments = {
        "x_ptr": x, "a_ptrs": tuple(adapters), "t_ptrs": tuple(ts), "ranks": ranks, "M": m, "K": k,
        "steps": -(-k // (parts * tile.k)),
        "factor": 1.0 / (1.0 - dropout_p), **numbered(seeds),
        "threshold": threshold(dropout_p), "x_m": x.stride(0), "x_k": x.stride(1),
        "a_r": tuple(a.stride(0) for a in adapters), "a_k": tuple(a.stride(1) for a in adapters),
        "DROPOUT": seeds is not None, "DTYPE": TL_DTYPES[x.dtype],
        "PRECISION": precision(x.dtype, target),
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": tile.r,
    }  # fmt: skip
    grid = (-(-m // tile.m), -(-max(ranks) // tile.r), parts)
    return Launch(_shrink, grid, arguments, tile)


def _pass(
    x: Tensor, adapters: Sequence[Tensor], seeds: Sequence[int] | None, dropout_p: float
) -> list[Tensor]:
    """Compute every t of up to three adapters in one pass over x."""
    (m, k), ranks, target = x.shape, [a.shape[0] for a in adapters], target_of(x)
    parts = shrink_shares(m, k, max(ranks))
    if parts == 1:
        outs = [torch.empty(m, r, dtype=x.dtype, device=x.device) for r in ranks]
    else:
        outs = [torch.empty(parts, m, r, dtype=torch.float32, device=x.device) for r in ranks]
    key = (
        "shrink", x.device, parts, precision(x.dtype, target), layout(x, *adapters),
        None if seeds is None else tuple(seed < 2**31 for seed in seeds),
    )  # fmt: skip
    fresh = {
        "x_ptr": x, "a_ptrs": tuple(adapters), "t_ptrs": tuple(outs),
        "factor": 1.0 / (1.0 - dropout_p), **numbered(seeds),
        "threshold": threshold(dropout_p),
    }  # fmt: skip
    run_prepared(key, fresh, lambda: launch(x, adapters, outs, seeds, dropout_p, target))
    return outs if parts == 1 else add_shares([Sum(share, x.dtype) for share in outs])[0]


def shrink(
    x: Tensor,
    adapters: Sequence[Tensor],
    seeds: Sequence[int] | None = None,
    dropout_p: float = 0.0,
) -> list[Tensor]:
    """x (M, K), adapters (Rᵢ, K) of any dtype -> every t (M, Rᵢ), contiguous, in the dtype of x.

    Any strides. ``seeds``, one for each adapter, mask x. fp32 accumulation, one rounding.
    """
    ts = []
    for first in range(0, len(adapters), ADAPTERS_PER_PASS):
        part = slice(first, first + ADAPTERS_PER_PASS)
        ts += _pass(x, adapters[part], None if seeds is None else seeds[part], dropout_p)
    return ts

"""keep(m, k) = Philox(seed; m, k/4)[k mod 4] >> 1 ≥ p · 2³¹: dropout that nothing has to store.

The counter is the element's own row and column, so every kernel draws the same mask whatever its
tile is, and forward and backward agree on M·K bits that are never written: a stored mask would
move M·K bytes each time it is made or read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, threshold, m, k0, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows m (BLOCK_M,) int64, columns k0 + [0, BLOCK_K), k0 a multiple of 4 -> bool tile."""
    group = k0 // 4 + tl.arange(0, BLOCK_K // 4)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 4), tl.uint32)
    rows = zero + m.to(tl.uint32)[:, None]
    columns = zero + group.to(tl.uint32)[None, :]
    high = zero + (m >> 32).to(tl.uint32)[:, None]
    # One Philox call makes the numbers of four neighbours.
    r0, r1, r2, r3 = tl.philox(seed, rows, columns, high, zero)
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK_M, BLOCK_K))
    return (bits >> 1).to(tl.int32) >= threshold


def threshold(dropout_p: float) -> int:
    """p as an integer: an element stays if 31 of its random bits are at least this."""
    return min(round(dropout_p * 2**31), 2**31 - 1)

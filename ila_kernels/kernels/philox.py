"""keep(m, k) = h ≥ p · 2¹⁶, with h the (k mod 8)th 16 bits of Philox(seed; m, k/8): nothing stored.

The counter is the element's own row and column, so every kernel draws the same mask under
any tile, and forward and backward agree on M·K bits that are never written: a stored mask would
move M·K bytes each time it is made or read.

The cost is arithmetic, so every drawn bit counts: 16 bits an element keep 1 − p
to within 2⁻¹⁷, and with 7 rounds the loop of ``shrink`` at R = 16 takes 351 instructions on sm_90
(593 with 10 rounds and 32 bits an element; 10 rounds alone make it 422).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

# 7 rounds of Philox-4x32 have no known statistical flaw; 10, the usual number, have a margin for
# later findings (https://cpprefjp.github.io/reference/random/philox4x32.html).
ROUNDS = tl.constexpr(7)


@triton.jit
def keep_tile(seed, threshold, m, k0, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows m (BLOCK_M,) int64, columns k0 + [0, BLOCK_K), k0 a multiple of 8 -> bool tile."""
    group = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.uint32)
    rows = zero + m.to(tl.uint32)[:, None]
    columns = zero + group.to(tl.uint32)[None, :]
    high = zero + (m >> 32).to(tl.uint32)[:, None]
    # One Philox call makes the numbers of eight neighbours.
    r0, r1, r2, r3 = tl.philox(seed, rows, columns, high, zero, n_rounds=ROUNDS)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    low, high = (words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32)
    return tl.reshape(tl.join(low >= threshold, high >= threshold), (BLOCK_M, BLOCK_K))


def numbered(seeds: Sequence[int] | None) -> dict[str, int]:
    """Name up to three seeds as arguments of a launch.

    Not as one tuple: Triton specialises the numbers in a tuple, so every sixteenth seed would
    compile its kernel anew.
    """
    return {f"seed{i}": seeds[i] if seeds and i < len(seeds) else 0 for i in range(3)}


def threshold(dropout_p: float) -> int:
    """p as an integer: an element stays if its 16 random bits are at least this."""
    return min(round(dropout_p * 2**16), 2**16 - 1)

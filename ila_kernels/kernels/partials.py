"""out = s·γ · Σ_c share[c], and ⟨Σ_c share[c], t⟩: the second half of a sum over programs.

Programs that add to one result write fp32 shares of it, and this kernel adds them in a fixed order:
the same bits every time, which float atomics do not give. One launch takes several sums (u and dB
of a layer, dA of every adapter of a group): each would be a launch of its own for a few µs of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import Tile
from ila_kernels.kernels.launch import Launch, layout, run_prepared

# No products: four values a lane, and eight loads of each on their way at once.
TILE = Tile(m=512, n=1, k=1, r=1, warps=4, stages=1)
AHEAD = tl.constexpr(8)
# Sums of one launch, each a number of its own: Triton specialises the numbers in a tuple, and with
# them the kernel was compiled up to 13 times over 200 lengths of a batch.
MOST = 3


@triton.jit
def _add(
    share_ptr, out_ptr, gate_ptr, t_ptr, inner_ptr, block, size, count, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(0, count, AHEAD):
        # One load after the other, each waited for, took `count` times the latency of memory.
        for j in tl.static_range(AHEAD):
            c = c0 + j
            share = share_ptr + c.to(tl.int64) * size + i
            total += tl.load(share, mask=inside & (c < count), other=0.0)
    if t_ptr is not None:
        t = tl.load(t_ptr + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(inner_ptr + block, tl.sum(total * t))
    factor = scale
    if gate_ptr is not None:
        factor = scale * tl.load(gate_ptr).to(tl.float32)
    tl.store(out_ptr + i, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["steps0", "steps1", "steps2", "count0", "count1", "count2"])
def _sum_partials(
    share_ptrs, out_ptrs, gate_ptrs, t_ptrs, inner_ptrs,
    steps0, steps1, steps2, count0, count1, count2, scales,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, steps, counts = tl.program_id(0), (steps0, steps1, steps2), (count0, count1, count2)
    for j in tl.static_range(len(out_ptrs)):
        # A product with a constant: the compiler then knows which loads are of 16 bytes.
        size = steps[j] * STEP
        blocks = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < blocks):
            _add(
                share_ptrs[j], out_ptrs[j], gate_ptrs[j], t_ptrs[j], inner_ptrs[j],
                block, size, counts[j], scales[j], BLOCK,
            )  # fmt: skip
        block -= blocks


class Sum(NamedTuple):
    """One sum: shares (C, ...) in fp32 -> s·γ Σ_c of shape (...) in ``dtype``."""

    shares: Tensor
    dtype: torch.dtype
    scale: float = 1.0
    gate: Tensor | None = None
    # Of the shape of the result and contiguous: ⟨Σ_c, t⟩ is wanted too.
    t: Tensor | None = None


def launch(sums: Sequence[Sum], outs: Sequence[Tensor], inners: Sequence[Tensor | None]) -> Launch:
    """Describe the launch that makes several sums."""
    sizes, counts = [out.numel() for out in outs], [z.shares.shape[0] for z in sums]
    step = 1 if any(size % 8 for size in sizes) else 8
    arguments = {
        "share_ptrs": tuple(z.shares for z in sums), "out_ptrs": tuple(outs),
        "gate_ptrs": tuple(z.gate for z in sums), "t_ptrs": tuple(z.t for z in sums),
        "inner_ptrs": tuple(inners), "scales": tuple(float(z.scale) for z in sums),
        **{f"steps{i}": sizes[i] // step if i < len(sizes) else 0 for i in range(MOST)},
        **{f"count{i}": counts[i] if i < len(sizes) else 0 for i in range(MOST)},
        "STEP": step, "BLOCK": TILE.m,
    }  # fmt: skip
    return Launch(_sum_partials, (sum(_blocks(out) for out in outs),), arguments, TILE)


def _blocks(out: Tensor) -> int:
    return -(-out.numel() // TILE.m)


def add_shares(sums: Sequence[Sum]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Make every sum, and ⟨Σ_c, t⟩ as fp32 () where there is a t, by one launch."""
    outs = [torch.empty(z.shares.shape[1:], dtype=z.dtype, device=z.shares.device) for z in sums]
    inners = [
        None if z.t is None else torch.empty(_blocks(out), dtype=torch.float32, device=out.device)
        for z, out in zip(sums, outs, strict=True)
    ]
    shares, gates = [z.shares for z in sums], [z.gate for z in sums]
    key = (
        "sum_partials", shares[0].device, layout(*shares, *gates, *[z.t for z in sums]),
        tuple(z.dtype for z in sums),
    )  # fmt: skip
    fresh = {
        "share_ptrs": tuple(shares), "out_ptrs": tuple(outs), "gate_ptrs": tuple(gates),
        "t_ptrs": tuple(z.t for z in sums), "inner_ptrs": tuple(inners),
        "scales": tuple(float(z.scale) for z in sums),
    }  # fmt: skip
    run_prepared(key, fresh, lambda: launch(sums, outs, inners))
    return outs, [None if inner is None else inner.sum() for inner in inners]

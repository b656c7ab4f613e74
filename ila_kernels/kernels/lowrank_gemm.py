"""C = P Q + s·γ · (U V) ⊙ keep/(1−p) + bias: the forward and the input gradient by one kernel.

    y  = x Wᵀ + γα t Bᵀ + bias    P = x,  Q = Wᵀ, U = t, V = Bᵀ
    dx = dy W + γα u A            P = dy, Q = W,  U = u, V = A

Apart, the update reads and writes C once more: 2·M·N elements that this kernel does not move.

The low-rank product comes after the K loop, on the same accumulator: that leaves the loop as it
is in the plain GEMM, while a product before it changed how the loop's addresses were kept (up to
16 % more instructions in it on sm_80). γ is read on the device; γ = 0 makes the loop over R empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import gemm_tile
from ila_kernels.kernels.launch import TL_DTYPES, Launch, precision, target_of
from ila_kernels.kernels.philox import keep_tile, threshold


@triton.jit(do_not_specialize=["seed", "threshold"])
def _lowrank_gemm(
    p_ptr, q_ptr, u_ptr, v_ptr, gate_ptr, bias_ptr, c_ptr,
    M, N, K, R, scale, seed, threshold,
    p_m, p_k, q_k, q_n, u_m, u_r, v_r, v_n, bias_n, c_m,
    HAS_UPDATE: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Eight row blocks share a column block of Q while it is in L2.
    pid = tl.program_id(0)
    width = 8 * tl.cdiv(N, BLOCK_N)
    first = pid // width * 8
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    n0 = pid % width // rows * BLOCK_N
    m = (first + pid % width % rows).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n0.to(tl.int64) + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    p = p_ptr + m[:, None] * p_m + k.to(tl.int64)[None, :] * p_k
    q = q_ptr + k.to(tl.int64)[:, None] * q_k + n[None, :] * q_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            p_tile = tl.load(p, mask=in_m, other=0.0)
            q_tile = tl.load(q, mask=in_n, other=0.0)
        else:
            p_tile = tl.load(p, mask=in_m & (k < K - k0)[None, :], other=0.0)
            q_tile = tl.load(q, mask=in_n & (k < K - k0)[:, None], other=0.0)
        acc = tl.dot(p_tile, q_tile, acc, input_precision=PRECISION)
        p += tl.full((), BLOCK_K, tl.int64) * p_k
        q += tl.full((), BLOCK_K, tl.int64) * q_k
    if HAS_UPDATE:
        factor, rank = scale, R
        if gate_ptr is not None:
            gate = tl.load(gate_ptr).to(tl.float32)
            factor = scale * gate
            rank = tl.where(gate == 0.0, 0, R)
        update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if DROPOUT else acc
        # Not pipelined: its buffers came on top of those of the K loop. At R = 64 on sm_90 that
        # was 128 KiB for 96, and one block on a multiprocessor for two.
        for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
            r = r0 + tl.arange(0, BLOCK_R)
            u = u_ptr + m[:, None] * u_m + r[None, :] * u_r
            v = v_ptr + r.to(tl.int64)[:, None] * v_r + n[None, :] * v_n
            u_tile = tl.load(u, mask=in_m & (r < R)[None, :], other=0.0)
            v_tile = tl.load(v, mask=in_n & (r < R)[:, None], other=0.0)
            # s·γ goes into V in fp32 before its one rounding.
            v_tile = (v_tile.to(tl.float32) * factor).to(DTYPE)
            update = tl.dot(u_tile.to(DTYPE), v_tile, update, input_precision=PRECISION)
        if DROPOUT:
            keep = keep_tile(seed, threshold, m, n0, BLOCK_M, BLOCK_N)
            acc += tl.where(keep, update, 0.0)
        else:
            acc = update
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n * bias_n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(c_ptr + m[:, None] * c_m + n[None, :], acc.to(DTYPE), mask=in_m & in_n)


def launch(
    p: Tensor,
    q: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    c: Tensor,
    scale: float,
    gate: Tensor | None,
    bias: Tensor | None,
    seed: int | None,
    dropout_p: float,
    target: str,
) -> Launch:
    """Describe the launch that writes C (M, N); without U and V it is the plain GEMM."""
    (m, k), n = p.shape, q.shape[1]
    r = 1 if u is None else u.shape[1]
    dropout = seed is not None
    tile = gemm_tile(m, n, r, p.element_size(), target, dropout)
    strides = {
        "u_m": 1,
        "u_r": 1,
        "v_r": 1,
        "v_n": 1,
        "bias_n": bias.stride(0) if bias is not None else 1,
    }
    if u is not None:
        strides |= dict(zip(("u_m", "u_r", "v_r", "v_n"), u.stride() + v.stride(), strict=True))
    arguments = {
        "p_ptr": p, "q_ptr": q, "u_ptr": u, "v_ptr": v, "gate_ptr": gate, "bias_ptr": bias,
        "c_ptr": c, "M": m, "N": n, "K": k, "R": r,
        "scale": float(scale) / (1.0 - dropout_p), "seed": seed or 0,
        "threshold": threshold(dropout_p),
        "p_m": p.stride(0), "p_k": p.stride(1), "q_k": q.stride(0), "q_n": q.stride(1), **strides,
        "c_m": c.stride(0), "HAS_UPDATE": u is not None, "DROPOUT": dropout,
        "EVEN_K": k % tile.k == 0, "DTYPE": TL_DTYPES[p.dtype], "PRECISION": precision(p.dtype),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": tile.r,
    }  # fmt: skip
    return Launch(
        _lowrank_gemm, (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),), arguments, tile
    )


def lowrank_gemm(
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    seed: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """P (M, K), Q (K, N) of one dtype, U (M, R), V (R, N) of any -> C (M, N) in that dtype.

    Any strides. ``seed`` masks the low-rank product, as the input gradient needs it. fp32
    accumulation, one rounding.
    """
    c = torch.empty(p.shape[0], q.shape[1], dtype=p.dtype, device=p.device)
    launch(p, q, u, v, c, scale, gate, bias, seed, dropout_p, target_of(p)).run()
    return c

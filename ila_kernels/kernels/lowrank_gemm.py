"""C = P Q + s·γ · (U V) ⊙ keep/(1−p) + bias: the forward and the input gradient by one kernel.

    y  = x Wᵀ + γα t Bᵀ + bias    P = x,  Q = Wᵀ, U = t, V = Bᵀ
    dx = dy W + γα u A            P = dy, Q = W,  U = u, V = A

Apart, the update reads and writes C once more: 2·M·N elements that this kernel does not move.

The low-rank product comes after the K loop, on the same accumulator: that leaves the loop as it
is in the plain GEMM, while a product before it changed how the loop's addresses were kept (up to
16 % more instructions in it on sm_80). γ is read on the device; γ = 0 makes the loop over R empty.

On sm_90 and newer the same kernel has a persistent form: P and Q come in tensor descriptors (TMA,
no address arithmetic in the loop over K: 88 instructions instead of 124 in the forward on sm_90),
and one program on each multiprocessor walks over the tiles. U, V and C stay on pointers: they are
read or written once, in any dtype and with any strides.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.choice import preference
from ila_kernels.config import Tile, descriptor_refusal, gemm_form, gemm_tile, persistent_tile
from ila_kernels.device import multiprocessors, target_of
from ila_kernels.kernels.launch import TL_DTYPES, Launch, layout, precision, run_prepared
from ila_kernels.kernels.philox import keep_tile, threshold


@triton.jit
def _update_tiles(
    u_ptr, v_ptr, m, n, r0, in_m, in_n, rank, factor, u_m, u_r, v_r, v_n,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = r0 + tl.arange(0, BLOCK_R)
    u = u_ptr + m[:, None] * u_m + r[None, :] * u_r
    v = v_ptr + r.to(tl.int64)[:, None] * v_r + n[None, :] * v_n
    u_tile = tl.load(u, mask=in_m & (r < rank)[None, :], other=0.0)
    v_tile = tl.load(v, mask=in_n & (r < rank)[:, None], other=0.0)
    # s·γ goes into V in fp32 before its one rounding.
    return u_tile.to(DTYPE), (v_tile.to(tl.float32) * factor).to(DTYPE)


@triton.jit
def _placed(pid, M, columns, BLOCK_M: tl.constexpr):
    """Row and column block of a program, of so many column blocks."""
    # Eight row blocks share a column block of Q while it is in L2.
    width = 8 * columns
    first = pid // width * 8
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    return first + pid % width % rows, pid % width // rows


@triton.jit
def _tile(
    row, column, p_ptr, q_ptr, u_ptr, v_ptr, gate_ptr, bias_ptr, c_ptr,
    M, N, K, R, scale, seed, threshold,
    p_m, p_k, q_k, q_n, u_m, u_r, v_r, v_n, bias_n, c_m,
    HAS_UPDATE: tl.constexpr, ONE_STEP: tl.constexpr, DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr, PERSISTENT: tl.constexpr, Q_ROWS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n0 = column * BLOCK_N
    m = row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n0.to(tl.int64) + tl.arange(0, BLOCK_N)
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    if HAS_UPDATE:
        factor, rank = scale, R
        if gate_ptr is not None:
            gate = tl.load(gate_ptr).to(tl.float32)
            factor = scale * gate
            rank = tl.where(gate == 0.0, 0, R)
        # Before the K loop, whose first loads they share the latency with; after it they would
        # wait once more, 1.5 to 2 µs of the 19 of a tile at K = 4096.
        if ONE_STEP:
            u_tile, v_tile = _update_tiles(
                u_ptr, v_ptr, m, n, 0, in_m, in_n, rank, factor, u_m, u_r, v_r, v_n, DTYPE, BLOCK_R
            )
    # Added at the end, the old C caused 10 to 17 spills in the persistent form on sm_100; in the
    # accumulator from the start, it took the registers of one block of two with pointers on sm_90.
    if ACCUMULATE and PERSISTENT:
        c = c_ptr + m[:, None] * c_m + n[None, :]
        acc = tl.load(c, mask=in_m & in_n, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PERSISTENT:
        # P and Q are tensor descriptors: elements outside read as zeros, without a mask.
        for k0 in range(0, K, BLOCK_K):
            p_tile = p_ptr.load([row * BLOCK_M, k0])
            q_tile = q_ptr.load([k0, n0]) if Q_ROWS else q_ptr.load([n0, k0]).T
            acc = tl.dot(p_tile, q_tile, acc, input_precision=PRECISION)
    else:
        k = tl.arange(0, BLOCK_K)
        p = p_ptr + m[:, None] * p_m + k.to(tl.int64)[None, :] * p_k
        q = q_ptr + k.to(tl.int64)[:, None] * q_k + n[None, :] * q_n
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
        # In fp32 the update is summed apart, as a library's product is: on the accumulator of the
        # K loop each of its R terms was rounded at the size of C, beyond twice eager's error at
        # R = 300. In 16 bits those roundings are 2⁻¹⁶ of the one of the result.
        APART: tl.constexpr = DROPOUT or DTYPE == tl.float32
        update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if APART else acc
        if ONE_STEP:
            update = tl.dot(u_tile, v_tile, update, input_precision=PRECISION)
        else:
            # Not pipelined: its buffers would add to the buffers of the K loop. At R = 64 on sm_90
            # that was 128 KiB for 96, and one block on a multiprocessor for two.
            for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
                u_tile, v_tile = _update_tiles(
                    u_ptr, v_ptr, m, n, r0, in_m, in_n, rank, factor, u_m, u_r, v_r, v_n,
                    DTYPE, BLOCK_R,
                )  # fmt: skip
                update = tl.dot(u_tile, v_tile, update, input_precision=PRECISION)
        if DROPOUT:
            keep = keep_tile(seed, threshold, m, n0, BLOCK_M, BLOCK_N)
            acc += tl.where(keep, update, 0.0)
        elif APART:
            acc += update
        else:
            acc = update
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n * bias_n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE and not PERSISTENT:
        # One half of the columns after the other: the whole old C beside all the accumulators
        # took 148 registers on sm_100, and one block of two; this takes 94 at most.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)).split()
        for i in tl.static_range(2):
            half = n0 + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            c = c_ptr + m[:, None] * c_m + half[None, :]
            inside = in_m & (half < N)[None, :]
            total = halves[i] + tl.load(c, mask=inside, other=0.0).to(tl.float32)
            tl.store(c, total.to(DTYPE), mask=inside)
    else:
        # The addresses last: made before the rounding, fp32 dx with dropout spilled 2 on sm_100.
        tl.store(c_ptr + m[:, None] * c_m + n[None, :], acc.to(DTYPE), mask=in_m & in_n)


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _lowrank_gemm(
    p_ptr, q_ptr, u_ptr, v_ptr, gate_ptr, bias_ptr, c_ptr,
    M, N, K, R, scale, seed, threshold,
    p_m, p_k, q_k, q_n, u_m, u_r, v_r, v_n, bias_n, c_m,
    HAS_UPDATE: tl.constexpr, ONE_STEP: tl.constexpr, DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr, PERSISTENT: tl.constexpr, Q_ROWS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        # Not flattened into the loop over K: with a loop over R beside it the compiler does not,
        # and without one the K loop grew from 88 to 626 instructions on sm_90.
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            row, column = _placed(pid, M, tl.cdiv(N, BLOCK_N), BLOCK_M)
            _tile(
                row, column, p_ptr, q_ptr, u_ptr, v_ptr, gate_ptr, bias_ptr, c_ptr,
                M, N, K, R, scale, seed, threshold,
                p_m, p_k, q_k, q_n, u_m, u_r, v_r, v_n, bias_n, c_m,
                HAS_UPDATE, ONE_STEP, DROPOUT, ACCUMULATE, EVEN_K, PERSISTENT, Q_ROWS,
                DTYPE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
    else:
        row, column = _placed(tl.program_id(0), M, tl.cdiv(N, BLOCK_N), BLOCK_M)
        _tile(
            row, column, p_ptr, q_ptr, u_ptr, v_ptr, gate_ptr, bias_ptr, c_ptr,
            M, N, K, R, scale, seed, threshold,
            p_m, p_k, q_k, q_n, u_m, u_r, v_r, v_n, bias_n, c_m,
            HAS_UPDATE, ONE_STEP, DROPOUT, ACCUMULATE, EVEN_K, PERSISTENT, Q_ROWS, DTYPE, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip


def loads_early(r: int, tile: Tile, element_bytes: int, by_columns: bool) -> bool:
    """Return whether U and V are loaded before the loop over K, and not after it.

    They are where one step covers R and two blocks stay on a multiprocessor of sm_90: at R = 64
    their 32 KiB came on top of the loop's 96. In fp32 they took the registers of the products, and
    in dx at R = 8, where V is loaded element by element, the loop took 108 instructions for 102.
    """
    return r <= tile.r <= 32 and element_bytes == 2 and (r % 16 == 0 or by_columns)


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
    programs: int | None = None,
    tile: Tile | None = None,
    accumulate: bool = False,
) -> Launch:
    """Describe the launch that writes C (M, N); without U and V it is the plain GEMM.

    With ``programs`` it is the persistent form on so many of them, for operands that ``form``
    allows. ``tile`` replaces that of the table. With ``accumulate`` it adds to the content of C.
    """
    (m, k), n = p.shape, q.shape[1]
    r = 1 if u is None else u.shape[1]
    dropout = seed is not None
    if tile is None and programs is not None:
        tile = persistent_tile(r, target, dropout)
    elif tile is None:
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
        "c_m": c.stride(0), "HAS_UPDATE": u is not None,
        "ONE_STEP": loads_early(r, tile, p.element_size(), strides["v_r"] == 1),
        "DROPOUT": dropout, "ACCUMULATE": accumulate, "EVEN_K": k % tile.k == 0,
        "PERSISTENT": False, "Q_ROWS": True,
        "DTYPE": TL_DTYPES[p.dtype], "PRECISION": precision(p.dtype, target),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": tile.r,
    }  # fmt: skip
    tiles = -(-m // tile.m) * -(-n // tile.n)
    if programs is None:
        return Launch(_lowrank_gemm, (tiles,), arguments, tile)
    return Launch(_lowrank_gemm, (min(tiles, programs),), arguments | _described(p, q, tile), tile)


def _described(p: Tensor, q: Tensor, tile: Tile) -> dict[str, object]:
    """Return the arguments of the persistent form: P and Q as descriptors with their strides."""
    q_rows = _by_rows(q)
    stored = q if q_rows else q.t()
    block = (tile.k, tile.n) if q_rows else (tile.n, tile.k)
    return {
        "p_ptr": _descriptor(p, (tile.m, tile.k)), "q_ptr": _descriptor(stored, block),
        "p_m": 1, "p_k": 1, "q_k": 1, "q_n": 1,
        "EVEN_K": True, "PERSISTENT": True, "Q_ROWS": q_rows,
    }  # fmt: skip


def _descriptor(matrix: Tensor, block: tuple[int, int]):
    # Not at import: the pointer form also runs on versions of Triton that have none.
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], list(block))


def _by_rows(q: Tensor) -> bool:
    """Tell whether Q (K, N) is stored by rows, as in dx, or by columns, as in the forward."""
    return q.stride(1) == 1 and (q.stride(0) != 1 or q.shape[0] == 1)


@functools.cache
def has_descriptors() -> bool:
    """Return whether this version of Triton has tensor descriptors: 3.4 and later do."""
    return find_spec("triton.tools.tensor_descriptor") is not None


def form(p: Tensor, q: Tensor, target: str, preferred: str | None) -> tuple[str, str]:
    """Choose the form of the product P Q, ``"pointer"`` or ``"persistent"``, and say why."""
    shape = p.shape[0], q.shape[1], p.element_size(), target
    if preferred == "persistent" and not has_descriptors():
        return "pointer", f"Triton {triton.__version__} has no tensor descriptors, 3.4 has"
    chosen = gemm_form(*shape, preferred=preferred)
    if chosen[0] == "pointer":  # and the operands need no look
        return chosen
    stored = q if _by_rows(q) else q.t()
    p_refusal, q_refusal = (
        descriptor_refusal(z.data_ptr(), tuple(z.shape), z.stride(), z.element_size())
        for z in (p, stored)
    )
    return gemm_form(*shape, (p_refusal, q_refusal), preferred)


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
    out: Tensor | None = None,
) -> Tensor:
    """P (M, K), Q (K, N) of one dtype, U (M, R), V (R, N) of any -> C (M, N) in that dtype.

    Any strides. ``seed`` masks the low-rank product, as the input gradient needs it. fp32
    accumulation, one rounding. ``out``, of C's dtype and stored row by row, is added to.
    """
    c = out
    if c is None:
        c = torch.empty(p.shape[0], q.shape[1], dtype=p.dtype, device=p.device)
    target = target_of(p)
    arguments = (p, q, u, v, c, scale, gate, bias, seed, dropout_p, target)
    if form(p, q, target, preference().gemm)[0] == "persistent":
        # Not prepared: a descriptor holds the address and is encoded anew each time.
        programs = multiprocessors(p.device.index or 0)
        launch(*arguments, programs, accumulate=out is not None).run()
        return c
    key = (
        "lowrank_gemm", p.device, precision(p.dtype, target), layout(p, q, u, v, c, gate, bias),
        out is None, None if seed is None else seed < 2**31,
    )  # fmt: skip
    fresh = {
        "p_ptr": p, "q_ptr": q, "u_ptr": u, "v_ptr": v, "gate_ptr": gate, "bias_ptr": bias,
        "c_ptr": c, "scale": float(scale) / (1.0 - dropout_p), "seed": seed or 0,
        "threshold": threshold(dropout_p),
    }  # fmt: skip
    run_prepared(key, fresh, lambda: launch(*arguments, accumulate=out is not None))
    return c

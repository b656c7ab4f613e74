"""u = dy B, dB = γα dyᵀ t, dγ = α ⟨u, t⟩ from one read of dy.

Apart, u and dB read dy once each: M·N elements more, as much as the layer's output. A program keeps
one column block of dB in registers while it walks down a stretch of rows, and leaves its share of
u as fp32; ``partials`` adds the shares in a fixed order. The shares grow with R:
``config.one_read_pays`` says up to where they are less than the read they save.

Both products are made transposed, uᵀ = Bᵀ dyᵀ and dBᵀ = tᵀ dy: so dy is the second operand of both
and its tiles are copied into shared memory ahead of the products. As the first operand of one of
them it went through registers on sm_80, and every step waited for its own load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.config import grad_tile, rows_per_program
from ila_kernels.device import target_of
from ila_kernels.kernels.launch import TL_DTYPES, Launch, layout, precision, run_prepared
from ila_kernels.kernels.partials import Sum, add_shares


@triton.jit(do_not_specialize=["M", "ROWS", "R_STEPS"])
def _grad_out(
    dy_ptr, b_ptr, t_ptr, u_ptr, db_ptr, M, N, R_STEPS, ROWS,
    dy_m, dy_n, b_n, b_r,
    R_STEP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # A product with a constant, so that the compiler knows which rows of t start at 16 bytes.
    R = R_STEPS * R_STEP
    column, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_n, in_r = (n < N)[None, :], (r < R)[:, None]
    b = b_ptr + r.to(tl.int64)[:, None] * b_r + n[None, :] * b_n
    b_tile = tl.load(b, mask=in_r & in_n, other=0.0).to(DTYPE)
    db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for step in range(0, ROWS, BLOCK_M):
        m = stretch * ROWS + step + tl.arange(0, BLOCK_M)
        in_m = m < M
        dy = dy_ptr + m[:, None] * dy_m + n[None, :] * dy_n
        dy_tile = tl.load(dy, mask=in_m[:, None] & in_n, other=0.0)
        t = t_ptr + m[None, :] * R + r[:, None]
        t_tile = tl.load(t, mask=in_r & in_m[None, :], other=0.0)
        u = tl.dot(b_tile, tl.trans(dy_tile), input_precision=PRECISION)
        u_out = u_ptr + (column * M + m)[None, :] * R + r[:, None]
        tl.store(u_out, u, mask=in_r & in_m[None, :])
        db = tl.dot(t_tile, dy_tile, db, input_precision=PRECISION)
    db_out = db_ptr + (stretch * N + n)[None, :] * R + r[:, None]
    tl.store(db_out, db, mask=in_r & in_n)


def launch(dy: Tensor, b: Tensor, t: Tensor, u: Tensor, db: Tensor, target: str) -> Launch:
    """Describe the launch that writes the shares of u (·, M, R) and of dB (·, N, R)."""
    (m, n), r = dy.shape, b.shape[1]
    tile, step = grad_tile(r, dy.element_size(), target), 1 if r % 8 else 8
    arguments = {
        "dy_ptr": dy, "b_ptr": b, "t_ptr": t, "u_ptr": u, "db_ptr": db, "M": m, "N": n,
        "R_STEPS": r // step, "ROWS": rows_per_program(m, n),
        "dy_m": dy.stride(0), "dy_n": dy.stride(1), "b_n": b.stride(0), "b_r": b.stride(1),
        "R_STEP": step, "DTYPE": TL_DTYPES[dy.dtype], "PRECISION": precision(dy.dtype, target),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_R": tile.r,
    }  # fmt: skip
    grid = (u.shape[0], db.shape[0], -(-r // tile.r))
    return Launch(_grad_out, grid, arguments, tile)


def shares(dy: Tensor, r: int, target: str) -> tuple[Tensor, Tensor]:
    """Room for the shares of u and of dB, both fp32."""
    (m, n), tile = dy.shape, grad_tile(r, dy.element_size(), target)
    wide = {"dtype": torch.float32, "device": dy.device}
    u = torch.empty(-(-n // tile.n), m, r, **wide)
    return u, torch.empty(-(-m // rows_per_program(m, n)), n, r, **wide)


def grad_out(
    dy: Tensor,
    b: Tensor,
    t: Tensor,
    scale: float,
    gate: Tensor | None,
    db_dtype: torch.dtype,
    wants_inner: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dy (M, N), B (N, R), t (M, R) contiguous -> u (M, R), dB (N, R), α ⟨u, t⟩ as fp32 ().

    u has the dtype of dy; ⟨u, t⟩, made if it is wanted, is taken before u is rounded.
    """
    target = target_of(dy)
    u_shares, db_shares = shares(dy, b.shape[1], target)
    key = ("grad_out", dy.device, precision(dy.dtype, target), layout(dy, b, t))
    fresh = {"dy_ptr": dy, "b_ptr": b, "t_ptr": t, "u_ptr": u_shares, "db_ptr": db_shares}
    run_prepared(key, fresh, lambda: launch(dy, b, t, u_shares, db_shares, target))
    whole_u = Sum(u_shares, dy.dtype, t=t if wants_inner else None)
    (u, db), (inner, _) = add_shares([whole_u, Sum(db_shares, db_dtype, scale, gate)])
    return u, db, None if inner is None else inner * scale

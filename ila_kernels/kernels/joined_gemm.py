"""yᵢ = x Wᵢᵀ + γᵢαᵢ tᵢ Bᵢᵀ + biasᵢ for two or three layers of one x, by one launch.

Their columns lie side by side in one grid: k and v, a quarter as wide as q, fill the rest of
the last wave of q instead of making two waves of their own, x comes from L2 for all outputs (M·K
elements for each further one, apart), and the host pays for one launch. A program picks the
pointers of its output before its loop over K, which is that of ``lowrank_gemm``, and so are the
bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ila_kernels.choice import preference
from ila_kernels.config import ADAPTERS_PER_PASS, gemm_tile
from ila_kernels.device import target_of
from ila_kernels.group import Member
from ila_kernels.kernels.launch import TL_DTYPES, Launch, layout, precision, run_prepared
from ila_kernels.kernels.lowrank_gemm import _placed, _tile, form, loads_early, lowrank_gemm


@triton.jit
def _picked(values, i):
    value = values[0]
    for j in tl.static_range(1, len(values)):
        value = tl.where(i == j, values[j], value)
    return value


@triton.jit(do_not_specialize=["M"])
def _joined_gemm(
    p_ptr, q_ptrs, u_ptrs, v_ptrs, gate_ptrs, bias_ptrs, c_ptrs, M, Ns, K, ranks, scales,
    p_m, p_k, q_n,
    ONE_STEP: tl.constexpr, EVEN_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    columns = 0
    for j in tl.static_range(len(Ns)):
        columns += tl.cdiv(Ns[j], BLOCK_N)
    # The columns of all outputs side by side, so that programs of one x run at one time.
    row, column = _placed(tl.program_id(0), M, columns, BLOCK_M)
    i, first, end = 0, 0, 0
    for j in tl.static_range(len(Ns) - 1):
        end += tl.cdiv(Ns[j], BLOCK_N)
        past = column >= end
        i, first = tl.where(past, j + 1, i), tl.where(past, end, first)
    N, R = _picked(Ns, i), _picked(ranks, i)
    _tile(
        row, column - first, p_ptr, _picked(q_ptrs, i), _picked(u_ptrs, i), _picked(v_ptrs, i),
        _picked(gate_ptrs, i) if gate_ptrs is not None else None,
        _picked(bias_ptrs, i) if bias_ptrs is not None else None, _picked(c_ptrs, i),
        M, N, K, R, _picked(scales, i), 0, 0,
        p_m, p_k, 1, q_n, R, 1, 1, R, 1, N,
        True, ONE_STEP, False, False, EVEN_K, False, True, DTYPE, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip


def launch(
    x: Tensor, members: Sequence[Member], ts: Sequence[Tensor], ys: Sequence[Tensor], target: str
) -> Launch:
    """Describe the launch that writes every y (M, Nᵢ) of members for which ``joins`` is true."""
    (m, k), ranks = x.shape, tuple(t.shape[1] for t in ts)
    tile = _tile_of(x, members[0], target)
    columns = sum(-(-y.shape[1] // tile.n) for y in ys)
    gates, biases = tuple(z.gate for z in members), tuple(z.bias for z in members)
    arguments = {
        "p_ptr": x, "q_ptrs": tuple(z.weight for z in members), "u_ptrs": tuple(ts),
        "v_ptrs": tuple(z.lora_b for z in members),
        "gate_ptrs": None if gates[0] is None else gates,
        "bias_ptrs": None if biases[0] is None else biases, "c_ptrs": tuple(ys),
        "M": m, "Ns": tuple(y.shape[1] for y in ys), "K": k, "ranks": ranks,
        "scales": tuple(float(z.scale) for z in members),
        "p_m": x.stride(0), "p_k": x.stride(1), "q_n": k,
        "ONE_STEP": loads_early(max(ranks), tile, x.element_size(), True),
        "EVEN_K": k % tile.k == 0, "DTYPE": TL_DTYPES[x.dtype],
        "PRECISION": precision(x.dtype, target),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": tile.r,
    }  # fmt: skip
    return Launch(_joined_gemm, (-(-m // tile.m) * columns,), arguments, tile)


def _tile_of(x: Tensor, member: Member, target: str):
    n, r = member.lora_b.shape
    return gemm_tile(x.shape[0], n, r, x.element_size(), target)


def joins(x: Tensor, members: Sequence[Member], target: str) -> bool:
    """Return whether one launch takes open members: one tile, one layout, one set of arguments."""
    if not 2 <= len(members) <= ADAPTERS_PER_PASS or 0 in x.shape:
        return False
    return len({_kind(x, z, target) for z in members}) == 1 and _kind(x, members[0], target)[0]


def _kind(x: Tensor, z: Member, target: str) -> tuple:
    """Tell whether a member can be joined, and return the values that joined members share."""
    able = z.weight.is_contiguous() and z.lora_b.is_contiguous() and 0 not in z.lora_b.shape
    able &= form(x, z.weight.t(), target, preference().gemm)[0] == "pointer"
    able &= z.bias is None or z.bias.is_contiguous()
    kinds = (None if t is None else t.dtype for t in (z.weight, z.lora_b, z.gate, z.bias))
    return bool(able), _tile_of(x, z, target), *kinds


def _run(
    x: Tensor, members: Sequence[Member], ts: Sequence[Tensor], ys: Sequence[Tensor], target: str
) -> None:
    weights, bs = [z.weight for z in members], [z.lora_b for z in members]
    gates, biases = [z.gate for z in members], [z.bias for z in members]
    key = (
        "joined_gemm", x.device, precision(x.dtype, target),
        layout(x, *weights, *ts, *bs, *gates, *biases),
    )  # fmt: skip
    fresh = {
        "p_ptr": x, "q_ptrs": tuple(weights), "u_ptrs": tuple(ts), "v_ptrs": tuple(bs),
        "gate_ptrs": None if gates[0] is None else tuple(gates),
        "bias_ptrs": None if biases[0] is None else tuple(biases), "c_ptrs": tuple(ys),
        "scales": tuple(float(z.scale) for z in members),
    }  # fmt: skip
    run_prepared(key, fresh, lambda: launch(x, members, ts, ys, target))


def outputs(x: Tensor, members: Sequence[Member], ts: Sequence[Tensor]) -> list[Tensor]:
    """x (M, K) and every t (M, Rᵢ) of open members -> every y (M, Nᵢ) in the dtype of x."""
    target, ys = target_of(x), []
    for first in range(0, len(members), ADAPTERS_PER_PASS):
        part, own = (z[first : first + ADAPTERS_PER_PASS] for z in (members, ts))
        if joins(x, part, target):
            sizes = [(x.shape[0], z.weight.shape[0]) for z in part]
            made = [torch.empty(size, dtype=x.dtype, device=x.device) for size in sizes]
            _run(x, part, own, made, target)
            ys += made
        else:
            ys += [
                lowrank_gemm(x, z.weight.t(), t, z.lora_b.t(), z.scale, z.gate, z.bias)
                for z, t in zip(part, own, strict=True)
            ]
    return ys

"""Which implementation runs, and on which tiles: pure functions of request, shape and target.

``impl="auto"`` is the only word that may choose; every other word runs or raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

Impl = Literal["auto", "triton", "eager", "reference"]
IMPLS: tuple[str, ...] = ("auto", "triton", "eager", "reference")


def resolve_impl(impl: str, device_type: str) -> tuple[str, str]:
    """Choose the implementation of one call and say why.

    Args:
        impl: One of ``"auto"``, ``"triton"``, ``"eager"``, ``"reference"``.
        device_type: Type of the device that holds the tensors, e.g. ``"cpu"`` or ``"cuda"``.

    Returns:
        The implementation that runs (never ``"auto"``) and the reason in words.

    Raises:
        ValueError: If ``impl`` is not one of the four words.
        RuntimeError: If ``impl="triton"`` cannot run here; the message says what is missing.

    >>> resolve_impl("auto", "cpu")
    ('eager', 'auto: library GEMM + addmm; no fused kernel for device type cpu')
    >>> resolve_impl("reference", "cuda")
    ('reference', 'asked for')
    """
    if impl == "auto" and device_type == "cuda":
        return (
            "eager",
            "auto: library GEMM + addmm; no measurement yet of the fused kernels on cuda",
        )
    if impl == "auto":
        return "eager", f"auto: library GEMM + addmm; no fused kernel for device type {device_type}"
    if impl == "triton":
        if device_type != "cuda":
            raise RuntimeError(
                "impl='triton' was asked for, but it needs a CUDA or ROCm GPU and the tensors are "
                f"on {device_type}; use impl='auto' or impl='eager'"
            )
        if find_spec("triton") is None:
            raise RuntimeError(
                "impl='triton' was asked for, but triton is not installed; "
                "use impl='auto' or impl='eager'"
            )
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    return impl, "asked for"


@dataclass(frozen=True)
class Tile:
    """Block sizes over M, N, K and R of one kernel, and its warps and pipeline stages."""

    m: int
    n: int
    k: int
    r: int
    warps: int
    stages: int


# None of these rows is measured: each is reasoned from what the compiler reports, and
# `benchmarks/compile_report.py` shows registers, spills and shared memory of every one.
# BLOCK_R is filled in from R.
GEMM_16BIT: dict[str, Tile] = {
    # 8 warps, not 4: 64 accumulators a thread instead of 128 leave room for the update's operands.
    "sm_80": Tile(128, 128, 32, 0, warps=8, stages=4),
    # Not 128 x 256: there the forward's K loop grew from 139 to 150 instructions with the update.
    "sm_90": Tile(128, 128, 64, 0, warps=8, stages=3),
    "sm_100": Tile(128, 128, 64, 0, warps=8, stages=3),
}
# For every other GPU, and where M or N would leave most of a larger block empty: 24 KiB of shared
# memory in flight, within what every target allows.
GEMM_SAFE = Tile(64, 64, 32, 0, warps=4, stages=3)
# IEEE fp32 products run on the ordinary units, whose operands live in registers.
# 64 x 64 and 64 x 32 spilled in the forward on sm_90; this one on none of the five targets.
GEMM_FP32 = Tile(32, 64, 16, 0, warps=4, stages=2)

# Rows of one program of a gradient that sums over M. A constant: the order of the sum, hence the
# bits of the result, then depend on the shape alone and not on the GPU.
ROWS_PER_PROGRAM = 1024


def rank_block(r: int, most: int) -> int:
    """Return the power of two in [16, most] that covers R, or ``most``; 16 is the least of the MMA.

    >>> rank_block(1, 64), rank_block(17, 64), rank_block(256, 64)
    (16, 32, 64)
    """
    return min(max(16, 1 << (r - 1).bit_length()), most)


def gemm_tile(
    m: int, n: int, r: int, element_bytes: int, target: str, dropout: bool = False
) -> Tile:
    """Tile of C (M, N) = P Q + U V.

    >>> gemm_tile(8192, 4096, 16, 2, "sm_90")
    Tile(m=128, n=128, k=64, r=16, warps=8, stages=3)
    >>> gemm_tile(8192, 4096, 16, 2, "a GPU of tomorrow") == gemm_tile(8, 8, 16, 2, "sm_90")
    True
    """
    if element_bytes == 4:
        return replace(GEMM_FP32, r=16)
    tile = GEMM_16BIT.get(target, GEMM_SAFE)
    if m <= 64 or n <= 64:
        tile = GEMM_SAFE
    elif dropout:
        # U V has an accumulator of its own until it is masked: at N = 128 that spilled on sm_80.
        tile = replace(tile, n=64)
    # No longer than the step over K, whose buffers then serve for U and V as well.
    return replace(tile, r=rank_block(r, tile.k))


def shrink_tile(r: int, element_bytes: int) -> Tile:
    """Tile of t (M, R) = x̂ Aᵀ: few rows, so that few thousand tokens already fill a GPU."""
    if element_bytes == 4:
        return Tile(32, 1, 32, rank_block(r, 32), warps=4, stages=2)
    return Tile(64, 1, 64, rank_block(r, 64), warps=4, stages=2)


def grad_tile(r: int, element_bytes: int) -> Tile:
    """Tile of the gradients that sum over M: the result's block stays in registers meanwhile.

    Wider blocks of N mean fewer shares of u to write and add: M·R·4·(N/BLOCK_N) bytes.
    """
    if element_bytes == 4:
        return Tile(32, 32, 1, rank_block(r, 16), warps=4, stages=1)
    return Tile(32, 128, 1, rank_block(r, 32), warps=4, stages=2)

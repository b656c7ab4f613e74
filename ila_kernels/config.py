"""Which implementation runs, and on which tiles: pure functions of request, shape and target.

``impl="auto"`` is the only word that may choose; every other word runs or raises.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from ila_kernels.choice import Call, gpu_impl, preferred, verdicts_in_use

Impl = Literal["auto", "triton", "hybrid", "eager", "reference"]
IMPLS: tuple[str, ...] = ("auto", "triton", "hybrid", "eager", "reference")
# The implementations that launch Triton kernels.
KERNEL_IMPLS = ("triton", "hybrid")


def has_triton() -> bool:
    """Tell whether Triton is installed; once it is imported this takes no time."""
    return sys.modules.get("triton") is not None or find_spec("triton") is not None


def resolve_impl(impl: str, device_type: str, call: Call | None = None) -> tuple[str, str]:
    """Choose the implementation of one call and say why.

    Args:
        impl: One of ``IMPLS``.
        device_type: Type of the device that holds the tensors, e.g. ``"cpu"`` or ``"cuda"``.
        call: Shapes, dtypes and GPU, by which ``"auto"`` chooses on a GPU (``choice``); without
            it ``"auto"`` takes ``"eager"``.

    Returns:
        The implementation that runs (never ``"auto"``; ``"persistent"`` is ``"triton"`` with that
        form of its GEMM) and the reason in words.

    Raises:
        ValueError: If ``impl`` is not one of these words.
        RuntimeError: If ``"triton"`` or ``"hybrid"``, asked for or set by ``prefer``, cannot run
            here; the message names the missing part.

    >>> resolve_impl("auto", "cpu")
    ('eager', 'auto: library GEMMs; no fused kernel for device type cpu')
    >>> resolve_impl("reference", "cuda")
    ('reference', 'asked for')
    """
    if impl == "auto" and device_type == "cuda" and call is not None:
        prefers = preferred()
        chosen, why = gpu_impl(call, prefers, verdicts_in_use())
        if chosen == "eager":
            return chosen, f"auto: library GEMMs; {why}"
        if prefers.auto is not None:
            resolve_impl(chosen, device_type)
        elif not has_triton():
            return "eager", "auto: library GEMMs; triton is not installed"
        return chosen, f"auto: {why}"
    if impl == "auto":
        return "eager", f"auto: library GEMMs; no fused kernel for device type {device_type}"
    if impl in KERNEL_IMPLS:
        if device_type != "cuda":
            raise RuntimeError(
                f"impl={impl!r} was asked for, but it needs a CUDA or ROCm GPU and the tensors are "
                f"on {device_type}; use impl='auto' or impl='eager'"
            )
        if not has_triton():
            raise RuntimeError(
                f"impl={impl!r} was asked for, but triton is not installed; "
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


# Shared memory that one block may have, in bytes, from the vendors' tables. Every row below stays
# within the limit of the GPUs it serves; `benchmarks/compile_report.py` checks that.
SHARED_LIMIT_BYTES: dict[str, int] = {
    "sm_75": 64 * 1024,
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
    "gfx942": 64 * 1024,
}

# None of the rows below is measured: each is reasoned from the reports of the compiler, and
# `benchmarks/compile_report.py` shows registers, spills and shared memory of every one.
# BLOCK_R is filled in from R.

# mma.sync with its operands in registers: 175 to 188 of them a thread on sm_80 to sm_89 (one block
# of 8 warps a multiprocessor), 124 to 181 on sm_120. 8 warps, not 4: 64 accumulators a thread
# instead of 128 leave room for the update's operands. 48 KiB in three buffers; 99 are the least.
_MMA_SYNC = Tile(128, 128, 32, 0, warps=8, stages=4)
GEMM_16BIT: dict[str, Tile] = {
    "sm_80": _MMA_SYNC,
    "sm_86": _MMA_SYNC,
    "sm_89": _MMA_SYNC,
    # Not GEMM_SAFE: at R = 8 its dx had a K loop 9 % longer than the plain one's.
    "sm_120": _MMA_SYNC,
    # Sisters of sm_80 and sm_120: the same instructions, and no less shared memory.
    "sm_87": _MMA_SYNC,
    "sm_121": _MMA_SYNC,
    # wgmma reads its operands from shared memory: a longer step over K, 96 KiB in three buffers,
    # two blocks of at most 128 registers (one in the forward at R = 8: 165). Not 128 x 256: there
    # the forward's K loop grew from 139 to 150 instructions with the update.
    "sm_90": Tile(128, 128, 64, 0, warps=8, stages=3),
    # As sm_90, with the accumulators in tensor memory: two blocks of at most 124 registers.
    "sm_100": Tile(128, 128, 64, 0, warps=8, stages=3),
    "sm_103": Tile(128, 128, 64, 0, warps=8, stages=3),  # a sister of sm_100
}
# For every other GPU, and where M or N would leave most of a larger block empty: 24 KiB of shared
# memory at most, which every target has.
GEMM_SAFE = Tile(64, 64, 32, 0, warps=4, stages=3)
# IEEE fp32 products run on the ordinary units, whose operands live in registers: 77 to 122 here, a
# quarter to five eighths of the warps, 8 KiB of shared memory. 64 x 64 and 64 x 32 spilled in the
# forward on sm_90; this one on none of the five targets.
GEMM_FP32 = Tile(32, 64, 16, 0, warps=4, stages=2)

# The same kernel in its persistent form: operands come in tensor descriptors, and one program on
# each multiprocessor walks over the tiles.
GEMM_PERSISTENT: dict[str, Tile] = {
    # 128 KiB in four buffers, one block of 126 to 202 registers. K loop: 89 instructions at most
    # against 106 (dx) and 124 (forward) with pointers. Not 128 x 256: 226 to 255 registers, and
    # spills at R >= 64.
    "sm_90": Tile(128, 128, 64, 0, warps=8, stages=4),
    # 192 KiB in four buffers, one block. Accumulators in half of the tensor memory leave registers
    # for 128 x 256 (199 to 218), which reads a quarter less through L2 for each FLOP than
    # 128 x 128. K loop: 88 instructions at most. 128 x 128 with three stages spilled at R = 8.
    "sm_100": Tile(128, 256, 64, 0, warps=8, stages=4),
    "sm_103": Tile(128, 256, 64, 0, warps=8, stages=4),
    # 64 of 99 KiB in two buffers, one block of 156 to 189 registers.
    "sm_120": Tile(128, 128, 64, 0, warps=8, stages=3),
    "sm_121": Tile(128, 128, 64, 0, warps=8, stages=3),
}
# Where the persistent form runs unasked: nowhere. It has been compiled, emulated and compared with
# the reference, but not timed, and not run on a GPU; the pointer form takes any strides and needs
# no descriptor encoded at every launch. A target goes in here with its measurement.
PERSISTENT_BY_DEFAULT: frozenset[str] = frozenset()

# Adapters that one pass over x serves: q, k and v, or gate and up. A program holds accumulators and
# a mask for each of them; a fourth is another pass.
ADAPTERS_PER_PASS = 3

# Programs that give each multiprocessor of a large GPU (132 to 160 of them) work. A constant: the
# order of every sum, hence its bits, then depend on the shape alone and not on the GPU.
PROGRAMS = 256
# From so many rows on, 64 of them a program make enough programs.
MANY_ROWS = 4097


@functools.lru_cache(maxsize=4096)
def rows_per_program(m: int, columns: int) -> int:
    """Return the rows of one program of a gradient that sums over M: 1024, 512 or 256.

    Each stretch of rows leaves a share of the sum, so they are long where 256 columns a program
    already make enough programs, and short for few tokens and for the narrow layers (k and v).

    >>> rows_per_program(8192, 14336), rows_per_program(8192, 4096), rows_per_program(2048, 4096)
    (1024, 512, 256)
    """
    blocks = -(-columns // 256)
    for rows in (1024, 512):
        if blocks * -(-m // rows) >= PROGRAMS:
            return rows
    return 256


def prefetches(target: str) -> bool:
    """Return whether loads into shared memory run ahead of the products on a GPU.

    They do on NVIDIA's from sm_80 on, which all let a block have 99 KiB.
    """
    return SHARED_LIMIT_BYTES.get(target, 0) >= 99 * 1024


def rank_block(r: int, most: int) -> int:
    """Return the power of two in [16, most] that covers R, or ``most``; 16 is the least of the MMA.

    >>> rank_block(1, 64), rank_block(17, 64), rank_block(256, 64)
    (16, 32, 64)
    """
    return min(max(16, 1 << (r - 1).bit_length()), most)


@functools.lru_cache(maxsize=4096)
def gemm_tile(
    m: int, n: int, r: int, element_bytes: int, target: str, dropout: bool = False
) -> Tile:
    """Return the tile of C (M, N) = P Q + U V.

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


@functools.lru_cache(maxsize=4096)
def persistent_tile(r: int, target: str, dropout: bool = False) -> Tile:
    """Return the tile of the GEMM's persistent form, for a target in ``GEMM_PERSISTENT``.

    >>> persistent_tile(16, "sm_90")
    Tile(m=128, n=128, k=64, r=16, warps=8, stages=4)
    """
    tile = GEMM_PERSISTENT[target]
    # As in `gemm_tile`: at N = 128 the second accumulator spilled on sm_90.
    tile = replace(tile, n=64) if dropout else tile
    return replace(tile, r=rank_block(r, tile.k))


def descriptor_refusal(
    address: int, shape: tuple[int, int], strides: tuple[int, int], element_bytes: int
) -> str | None:
    """Say why no tensor descriptor can describe a row-major matrix; ``None`` if one can.

    Args:
        address: Of its first element, in bytes.
        shape: Rows and columns.
        strides: Of both, in elements.
        element_bytes: Size of an element.

    >>> descriptor_refusal(256, (100, 72), (72, 1), 2)
    >>> descriptor_refusal(256, (100, 70), (70, 1), 2)
    'rows are 140 bytes apart, no multiple of 16'
    """
    (rows, columns), (step, inner) = shape, strides
    if not (0 < rows < 2**31 and 0 < columns < 2**31):
        return f"shape {rows} x {columns} is not in [1, 2**31)"
    if inner != 1 and columns > 1:
        return f"neighbours in a row are {inner} elements apart, not 1"
    if address % 16:
        return f"it starts {address % 16} bytes past a multiple of 16"
    if step * element_bytes % 16:
        return f"rows are {step * element_bytes} bytes apart, no multiple of 16"
    if step < columns or step * element_bytes >= 2**40:
        return f"rows of {columns} elements are {step} elements apart"
    return None


@functools.lru_cache(maxsize=4096)
def gemm_form(
    m: int,
    n: int,
    element_bytes: int,
    target: str,
    refusals: tuple[str | None, str | None] = (None, None),
    preferred: str | None = None,
) -> tuple[str, str]:
    """Choose the form of the GEMM, ``"pointer"`` or ``"persistent"``, and say why.

    Args:
        m: Rows of C.
        n: Columns of C.
        element_bytes: Size of an element of P and Q.
        target: GPU class, e.g. ``"sm_90"``.
        refusals: ``descriptor_refusal`` of P and of Q.
        preferred: Value of ``prefer(gemm=…)``, or ``None`` for the table.

    >>> gemm_form(8192, 4096, 2, "sm_90")
    ('pointer', 'the persistent form is not measured on sm_90')
    >>> gemm_form(8192, 4096, 2, "sm_90", preferred="persistent")
    ('persistent', 'preferred')
    """
    if preferred == "pointer":
        return "pointer", "preferred"
    if target not in GEMM_PERSISTENT:
        return "pointer", f"no tile of the persistent form for {target}"
    if preferred is None and target not in PERSISTENT_BY_DEFAULT:
        return "pointer", f"the persistent form is not measured on {target}"
    if element_bytes != 2:
        return "pointer", "only 16-bit products read their operands from shared memory"
    if m <= 64 or n <= 64:
        return "pointer", "M or N fills at most half a tile"
    for name, refusal in zip("PQ", refusals, strict=True):
        if refusal is not None:
            return "pointer", f"no descriptor of {name}: {refusal}"
    return "persistent", "measured" if preferred is None else "preferred"


@functools.lru_cache(maxsize=4096)
def shrink_tile(
    m: int, r: int, element_bytes: int, target: str, adapters: int = 1, dropout: bool = False
) -> Tile:
    """Return the tile of every t (M, R) = x̂ Aᵀ: few rows, so that few thousand tokens fill a GPU.

    Where loads run ahead (``prefetches``), two or three tiles of x are on their way while one is
    multiplied: a GPU of 3 TB/s and 0.7 µs needs 2.1 MB in flight, and 128 programs with one tile
    of 8 KiB each had half of it. Few rows take tiles of 32 and a longer step over K.

    At most 178 registers a thread (three adapters at R = 64 on sm_80), 128 at R = 16, no spill and
    86 KiB of shared memory. A group under dropout holds a mask for each adapter, so its steps are
    shorter (at 64, three adapters spilled 3 to 27 registers on three targets) and beyond R = 16 it
    has two stages (with three, 2 to 6 spills on sm_120), blocks of 32 over R (at 64, 24 spills on
    sm_80) and for three adapters 32 rows (at 64, 3 spills there): the Philox rounds take longer
    than the loads. On sm_120 three adapters take short steps (at 64, 6 spills), and two under
    dropout two stages (with four, 2 spills at R = 8).

    Args:
        m: Rows M.
        r: R, the largest of the adapters'.
        element_bytes: Size of an element of x.
        target: GPU class.
        adapters: Number of A's that a program multiplies x with.
        dropout: Whether x is masked, for each of them anew.

    >>> shrink_tile(8192, 16, 2, "sm_90", adapters=3)
    Tile(m=64, n=1, k=64, r=16, warps=4, stages=3)
    """
    if element_bytes == 4 or not prefetches(target):
        return _plain_shrink_tile(r, element_bytes, adapters, dropout)
    group, narrow = adapters > 1, target in ("sm_120", "sm_121")
    block = rank_block(r, 32 if group and dropout else 64)
    wide = block > 16
    if group and dropout:
        if wide and adapters > 2:
            return Tile(32, 1, 32, block, warps=4, stages=2)
        few_stages = wide or (narrow and adapters == 2)
        return Tile(64, 1, 32, block, warps=8 if wide else 4, stages=2 if few_stages else 4)
    if narrow and adapters > 2 and not wide:
        return Tile(64, 1, 32, block, warps=4, stages=4)
    if m < MANY_ROWS and block <= 32:
        step = 64 if group or dropout or wide else 128
        return Tile(32, 1, step, block, warps=4, stages=4)
    if group:
        return Tile(64, 1, 32 if wide else 64, block, warps=8 if wide else 4, stages=3)
    return Tile(64, 1, 64, block, warps=4 if block <= 32 else 8, stages=4 if block <= 32 else 3)


def _plain_shrink_tile(r: int, element_bytes: int, adapters: int, dropout: bool) -> Tile:
    """Return the tile where nothing runs ahead, 45 KiB of shared memory at most, or for fp32.

    In fp32 64 rows and 8 warps for a group: with 4, three adapters spilled 2 to 4 on sm_100 and
    sm_120, but with 8 under dropout 10 on sm_90; at 32 rows, two spilled up to 13 on sm_90.
    """
    if adapters > 1:
        if element_bytes == 4:
            return Tile(64, 1, 16, 16, warps=4 if dropout and adapters > 2 else 8, stages=2)
        block = rank_block(r, 32 if dropout else 64)
        return Tile(64, 1, 32, block, warps=4 if block == 16 else 8, stages=2)
    if element_bytes == 4:
        return Tile(32, 1, 32, rank_block(r, 32), warps=4, stages=2)
    return Tile(64, 1, 64, rank_block(r, 64), warps=4, stages=2)


@functools.lru_cache(maxsize=4096)
def shrink_shares(m: int, k: int, r: int) -> int:
    """Return the parts of K that ``shrink`` sums apart, which cost one more launch to add.

    Up to R = 32 none: few rows take a lower tile, at the price of reading A more often. Beyond, A
    of that many reads is more than x, and programs come from K instead, 1024 or more each.

    >>> shrink_shares(8192, 4096, 64), shrink_shares(2048, 4096, 64), shrink_shares(2048, 4096, 16)
    (1, 4, 1)
    """
    if r <= 32 or m >= MANY_ROWS:
        return 1
    return max(1, min(-(-k // 1024), PROGRAMS // -(-max(m, 1) // 64)))


@functools.lru_cache(maxsize=4096)
def grad_tile(r: int, element_bytes: int, target: str, adapters: int = 1) -> Tile:
    """Return the tile of the gradients that sum over M; their block stays in registers meanwhile.

    Every block of N leaves a share of u, written and read as fp32: 8·R/BLOCK_N bytes for each
    element of dy, whose own second read, which sharing saves, is 2. So N is wide: at 256 columns
    the shares are 0.5 bytes at R = 16 and 2 at R = 64, where ``one_read_pays`` ends, against 1 and
    4 at 128. Two tiles of 16 KiB are on their way while one is multiplied, in two blocks of 112
    registers a multiprocessor at R = 16 (one of 154 at R = 8); no spill, at most 100 KiB at R = 64.
    AMD's compiler spills 108 registers of that tile, and an unknown GPU may not have the shared
    memory: both get 128 x 32, 24 KiB.
    """
    if element_bytes == 4:
        return Tile(32, 32, 1, 16, warps=4, stages=1)
    if prefetches(target):
        # Two adapters with blocks of 16 spilled 3 on sm_80, into the registers of a third block.
        block = {1: rank_block(r, 64), 2: 32}.get(adapters, rank_block(r, 32))
        return Tile(32, 256, 1, block, warps=8, stages=3)
    return Tile(32, 128, 1, rank_block(r, 32), warps=4, stages=2)


def own_grad_a(r: int, element_bytes: int, dropout: bool) -> bool:
    """Return whether dA is the work of our own kernel and not of the library's GEMM.

    It is under dropout, where the library needs x̂ in memory, and in 16 bits up to R = 64: there a
    program's block of dA covers all of R, x is read once for every adapter, and γα and the dtype
    of A are folded into the one rounding. The library's fp32 product is left alone.
    """
    return dropout or (element_bytes == 2 and r <= 64)


def one_read_pays(n: int, r: int, element_bytes: int, block_n: int) -> bool:
    """Tell whether u and dB from one read of dy (M, N) move less than from two.

    One read leaves shares of u, M·R·4 bytes a block of N, written and read again; the second read
    that it saves is M·N elements. In 16 bits, for a wide N and 256 columns a block: R < 64.

    >>> [one_read_pays(4096, r, 2, 256) for r in (16, 32, 64)]
    [True, True, False]
    """
    return 8 * r * -(-n // block_n) < element_bytes * n

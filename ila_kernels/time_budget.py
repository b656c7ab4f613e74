"""Where the time of a block goes on a GPU, computed: bytes and FLOPs by a few assumed speeds.

A budget, not a measurement: each row says which measurement would show it wrong. The base is the
time of the frozen GEMMs, x Wᵀ and dy W of every linear of a block; the rows are the further cost of
four ways to add a LoRA update to each of them.

    triton   the fused kernels, with a GEMM that takes ``rho`` times as long as the library's
    hybrid   our kernels for the thin products, then the library's GEMM added to the update (β = 1)
    eager    the library for everything, the update first
    addmm    the library for everything, the update after the GEMM
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ila_kernels.config import own_grad_a, rows_per_program, shrink_shares
from ila_kernels.roofline import Ceiling

# K, and the N of every linear that reads the same x.
Block = Sequence[tuple[int, Sequence[int]]]
LLAMA_3_8B: Block = (
    (4096, (4096, 1024, 1024)),
    (4096, (4096,)),
    (4096, (14336, 14336)),
    (14336, (4096,)),
)
PATHS = ("triton", "hybrid", "eager", "addmm")
BYTES = 2
BLOCK_N = 256


@dataclass(frozen=True)
class Speeds:
    """Assumed shares of a data sheet's peaks, and the cost of a launch.

    Attributes:
        gemm: Of the FLOP/s, a large GEMM of the library.
        memory: Of the bytes/s, a copy.
        thin: Of a copy's speed, a library GEMM with R columns.
        pointwise: Of a copy's speed, a pass that reads and writes the output.
        exposed: Share of reading C that a GEMM with β = 1 does not hide.
        gap_us: Time between two launches.
    """

    gemm: float = 0.71
    memory: float = 0.90
    thin: float = 0.55
    pointwise: float = 0.85
    exposed: float = 0.30
    gap_us: float = 2.0


@dataclass(frozen=True)
class BudgetRow:
    """Microseconds of one part of a block on each path, over the frozen GEMMs."""

    part: str
    us: dict[str, float]
    falsified_by: str


class _Clock:
    """Times of a GPU, in µs."""

    def __init__(self, gpu: Ceiling, speeds: Speeds):
        self.speeds = speeds
        self.flops_per_us = gpu.bf16_tflops * 1e6 * speeds.gemm
        self.bytes_per_us = gpu.memory_gb_s * 1e3 * speeds.memory

    def moved(self, bytes_: float, share: float = 1.0, launches: int = 0) -> float:
        return bytes_ / (self.bytes_per_us * share) + self.speeds.gap_us * launches


def base_us(gpu: Ceiling, tokens: int, block: Block = LLAMA_3_8B, speeds: Speeds | None = None):
    """Return the time of the frozen GEMMs of a block, forward and backward, in µs."""
    clock = _Clock(gpu, speeds or Speeds())
    return sum(4 * tokens * k * n for k, ns in block for n in ns) / clock.flops_per_us


def time_budget(
    gpu: Ceiling,
    tokens: int,
    rank: int = 16,
    block: Block = LLAMA_3_8B,
    rho: float = 1.0,
    speeds: Speeds | None = None,
) -> list[BudgetRow]:
    """Compute the rows of a block's budget: 16 bits, adapters everywhere, no dropout.

    Args:
        gpu: Peaks, e.g. ``roofline.CEILINGS["NVIDIA H100 80GB HBM3"]``.
        tokens: M.
        rank: R.
        block: K and every N of the linears that read one x.
        rho: Time of the Triton GEMM over that of the library's.
        speeds: Assumed speeds.

    Returns:
        A row for each part.

    >>> from ila_kernels.roofline import CEILINGS
    >>> rows = time_budget(CEILINGS["NVIDIA H100 80GB HBM3"], 8192)
    >>> [row.part for row in rows][:2]
    ['t = x Aᵀ', 'u = dy B and dB']
    """
    clock = _Clock(gpu, speeds or Speeds())
    parts = (_t, _u_and_db, _sums, _da, _update_y, _update_dx, _shared_dx)
    rows = [part(clock, tokens, rank, block) for part in parts]
    slower = (rho - 1.0) * base_us(gpu, tokens, block, clock.speeds)
    us = dict.fromkeys(PATHS, 0.0) | {"triton": slower}
    why = "ρ: our GEMM without an update over the library's, of every layer"
    return [*rows, BudgetRow(f"GEMMs at ρ = {rho:.2f}", us, why)]


def _row(part: str, ours: float, library: float, falsified_by: str) -> BudgetRow:
    us = {"triton": ours, "hybrid": ours, "eager": library, "addmm": library}
    return BudgetRow(part, us, falsified_by)


def _t(clock: _Clock, m: int, r: int, block: Block) -> BudgetRow:
    moved = shares = launches = 0
    for k, ns in block:
        parts = shrink_shares(m, k, r)
        moved += BYTES * m * k + len(ns) * (4 * r * k + BYTES * m * r)
        shares += 8 * parts * m * r * len(ns) if parts > 1 else 0
        launches += 1 if parts == 1 else 2
    ours = clock.moved(moved + shares, launches=launches)
    library = clock.moved(moved, clock.speeds.thin, len(block))
    return _row("t = x Aᵀ", ours, library, "shrink slower than 1.2 copies of x")


def _u_and_db(clock: _Clock, m: int, r: int, block: Block) -> BudgetRow:
    ours = library = 0.0
    for _, ns in block:
        for n in ns:
            thin = 4 * r * n + BYTES * m * r
            ours += clock.moved(BYTES * m * n + thin + _shares(m, n, r), launches=1)
            library += 2 * clock.moved(BYTES * m * n + thin, clock.speeds.thin, 1)
    return _row("u = dy B and dB", ours, library, "grad_out slower than 1.2 copies of dy")


def _shares(m: int, n: int, r: int) -> int:
    """Bytes of the shares of u and dB, written once."""
    return 4 * (-(-n // BLOCK_N) * m * r + -(-m // rows_per_program(m, n)) * n * r)


def _sums(clock: _Clock, m: int, r: int, block: Block) -> BudgetRow:
    every = [n for _, ns in block for n in ns]
    ours = sum(clock.moved(_shares(m, n, r) + BYTES * m * r + 4 * n * r, 1.0, 1) for n in every)
    return _row(
        "sums of their shares", ours, 0.0, "sum_partials slower than 1.5 reads of the shares"
    )


def _da(clock: _Clock, m: int, r: int, block: Block) -> BudgetRow:
    ours = library = 0.0
    for k, ns in block:
        moved = BYTES * m * k + len(ns) * (BYTES * m * r + 4 * r * k)
        shares = 8 * -(-m // rows_per_program(m, k)) * r * k * len(ns)
        library += clock.moved(moved, clock.speeds.thin, 1 + 2 * len(ns))  # and casts
        ours += clock.moved(moved + shares, launches=2)
    ours = ours if own_grad_a(r, BYTES, False) else library
    return _row("dA", ours, library, "grad_a slower than 1.2 copies of x")


def _update_y(clock: _Clock, m: int, r: int, block: Block) -> BudgetRow:
    outputs = [BYTES * m * n for _, ns in block for n in ns]
    why = "the GEMM with β = 1 over the one without: more than its read of C by bytes"
    return _update("update of y", clock, outputs, why)


def _update_dx(clock: _Clock, m: int, r: int, block: Block) -> BudgetRow:
    why = "as above, for dx"
    return _update("update of dx", clock, [BYTES * m * k for k, _ in block], why)


def _update(part: str, clock: _Clock, outputs: Sequence[int], why: str) -> BudgetRow:
    """Fused: nothing moved. First: a write, and a read in the GEMM. After: a read and a write."""
    s, total, launches = clock.speeds, sum(outputs), len(outputs)
    first = clock.moved(total, s.pointwise, launches) + clock.moved(total) * s.exposed
    after = clock.moved(2 * total, s.pointwise, launches)
    return BudgetRow(part, {"triton": 0.0, "hybrid": first, "eager": first, "addmm": after}, why)


def _shared_dx(clock: _Clock, m: int, r: int, block: Block) -> BudgetRow:
    """Count the dx of several layers in one tensor: each further GEMM reads it, no autograd sum."""
    further = sum(BYTES * m * k * (len(ns) - 1) for k, ns in block)
    launches = sum(len(ns) - 1 for _, ns in block)
    spared = clock.moved(3 * further, clock.speeds.pointwise, launches)
    us = clock.moved(further) * clock.speeds.exposed - spared
    why = "the block's backward with q, k and v apart: less than this slower"
    return BudgetRow("one dx of q, k, v and of gate, up", dict.fromkeys(PATHS, us), why)


def totals(rows: Sequence[BudgetRow]) -> dict[str, float]:
    """Add the rows up, for each path, in µs."""
    return {path: sum(row.us[path] for row in rows) for path in PATHS}


def markdown_table(gpu: Ceiling, tokens: int, rank: int = 16, rho: float = 1.0) -> str:
    """Return a budget as a table: µs of each part, and its sum in percent of the frozen GEMMs."""
    rows, base = time_budget(gpu, tokens, rank, rho=rho), base_us(gpu, tokens)
    lines = [
        f"| modelled µs over the frozen GEMMs' {base:.0f} | {' | '.join(PATHS)} | shown wrong by |",
        f"|---|{'---:|' * len(PATHS)}---|",
    ]
    for row in rows:
        cells = " | ".join(f"{row.us[path]:.0f}" for path in PATHS)
        lines.append(f"| {row.part} | {cells} | {row.falsified_by} |")
    cells = " | ".join(f"{us:.0f} ({us / base:+.1%})" for us in totals(rows).values())
    return "\n".join([*lines, f"| **sum** | {cells} | a block timed whole |"])

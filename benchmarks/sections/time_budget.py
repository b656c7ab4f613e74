"""Where the time of a block goes on three GPUs: computed from bytes, FLOPs and assumed speeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import table
from ila_kernels.roofline import CEILINGS
from ila_kernels.time_budget import PATHS, Speeds, base_us, markdown_table, time_budget, totals

PAGE = "how-it-works"
TITLE = "Where the time of a block would go on a GPU"
GPUS = {
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}
TOKENS, FEW = 8192, 2048
# Times of our GEMM over the library's.
RHOS = (1.0, 1.1, 1.2)


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs for the page on how it works; no file of results has a part in them."""
    speeds = Speeds()
    parts = [
        "**Modelled, not measured: none of these times was taken on a GPU.** One block of "
        "Llama-3-8B, every linear with an adapter of rank 16, bf16, no dropout, forward and "
        "backward: microseconds over the frozen products x Wᵀ and dy W. `triton` is the fused "
        "kernels, `hybrid` our thin kernels and then the library's GEMM, `eager` the library with "
        "the update first, `addmm` the library with the update last. The data sheet's speeds are "
        f"taken with these shares: products {speeds.gemm:.0%}, copies {speeds.memory:.0%}, "
        f"products with R columns {speeds.thin:.0%} of a copy; {speeds.gap_us:.0f} µs between two "
        "launches (`ila_kernels.time_budget`). Each row names the measurement that would show it "
        "wrong; `make gpu-day` takes the times of whole layers and steps.",
    ]
    for gpu, name in GPUS.items():
        parts += [f"**{name}, {TOKENS} tokens**", markdown_table(CEILINGS[gpu], TOKENS)]
    return [
        *parts,
        "The sums, in percent of the frozen products. ρ is the time of our GEMM over that of the "
        "library's, of which `triton` alone depends; it is not measured either.",
        _sums(),
    ]


def _sums() -> str:
    """The further cost of each path on each GPU."""
    rows = []
    for gpu, name in GPUS.items():
        for tokens in (TOKENS, FEW):
            ceiling = CEILINGS[gpu]
            base = base_us(ceiling, tokens)
            found = [totals(time_budget(ceiling, tokens, rho=rho)) for rho in RHOS]
            us = [f["triton"] for f in found] + [found[0][path] for path in PATHS[1:]]
            rows.append([f"{name}, {tokens} tokens", *(f"{cost / base:+.1%}" for cost in us)])
    header = ["modelled", *(f"triton, ρ = {rho:.2f}" for rho in RHOS), *PATHS[1:]]
    return table(header, rows)

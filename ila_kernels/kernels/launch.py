"""A launch as a value: the kernel, its grid, its arguments and its tile.

The launchers make a ``Launch`` and run it; ``benchmarks/compile_report.py`` makes the same one from
tensors without data and compiles it ahead of time, so what is proven there is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ila_kernels.config import Tile

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@dataclass(frozen=True)
class Launch:
    """One launch; arguments by name, constexprs included, absent tensors as ``None``."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile

    def run(self) -> None:
        """Launch on the current stream; a grid with a zero launches nothing."""
        if 0 in self.grid:
            return
        # FMA contraction only: said at each launch because Triton's default is about to change.
        self.kernel[self.grid](
            **self.arguments,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
            enable_fp_fusion=True,
        )


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are computed: tf32 only where PyTorch's own matmul would use it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"

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


def precision(dtype: torch.dtype, target: str) -> str:
    """Precision of products: tf32 where PyTorch's matmul would use it and the target has it."""
    if dtype != torch.float32 or not (target.startswith("sm_") or target == "gfx942"):
        return "ieee"
    return "tf32" if _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    """Read PyTorch's switch of tf32 for fp32 products on a GPU."""
    # `allow_tf32`, the only switch before PyTorch 2.9, raises once the new one was set.
    switch = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if switch is not None:
        return switch == "tf32"
    return torch.backends.cuda.matmul.allow_tf32


def is_capturing() -> bool:
    """Return whether the current stream records a CUDA graph."""
    # A build of PyTorch without GPUs, under which the kernels are emulated, has no such question.
    has_gpus = torch.version.cuda is not None or torch.version.hip is not None
    return has_gpus and torch.cuda.is_current_stream_capturing()


def seed_number(seed: torch.Tensor) -> int:
    """Read a seed of dropout from its tensor on the CPU; no GPU is waited for.

    Raises:
        RuntimeError: If a CUDA graph is being captured: the number is an argument of the launch,
            so each replay would draw the mask of the capture.
    """
    if is_capturing():
        raise RuntimeError(
            "dropout_p must be 0 while a CUDA graph is captured with impl='triton': every replay "
            "would draw the same mask; capture without dropout, or train without the graph"
        )
    return int(seed)

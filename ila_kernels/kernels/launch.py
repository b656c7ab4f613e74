"""A launch as a value: the kernel, its grid, its arguments and its tile; and launches prepared.

The launchers make a ``Launch`` and run it; ``benchmarks/compile_report.py`` makes the same one from
tensors without data and compiles it ahead of time: the proof holds for the launch that runs.

Making one and finding its compiled kernel took 48 µs of the host for a GEMM, as long as the GPU
works on it at a few hundred rows. Training repeats the same launches with other addresses, so
``run_prepared`` keeps the compiled kernel and the arguments of each, by everything that decides
them, and then fills in the new tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from ila_kernels.config import Tile
from ila_kernels.device import is_capturing

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

    def run(self) -> CompiledKernel | None:
        """Launch on the current stream; a grid with a zero launches nothing."""
        if 0 in self.grid:
            return None
        # FMA contraction only: said at each launch because Triton's default is about to change.
        return self.kernel[self.grid](
            **self.arguments,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
            enable_fp_fusion=True,
        )


class _Prepared:
    """A compiled kernel, its grid, its arguments in order, and which of them are new each time."""

    __slots__ = ("grid", "kernel", "places", "values")

    def __init__(self, kernel: CompiledKernel, launch: Launch, fresh: Iterable[str]):
        names = [parameter.name for parameter in launch.kernel.params]
        self.kernel, self.grid = kernel, (*launch.grid, 1, 1)[:3]
        self.places = [names.index(name) for name in fresh]
        # None in their places: a cache that held tensors would hold their memory.
        self.values = [None if name in fresh else launch.arguments[name] for name in names]

    def run(self, fresh: Iterable[Any]) -> None:
        values = self.values.copy()
        for place, value in zip(self.places, fresh, strict=True):
            values[place] = value
        self.kernel[self.grid](*values)


_prepared: dict[tuple, _Prepared] = {}
# A block of a Llama has about 30; a batch of another length makes as many new ones.
MOST_PREPARED = 4096


def layout(*tensors: Tensor | None) -> tuple:
    """Return the values that decide a launch: shapes, strides, dtypes, addresses modulo 16."""
    return tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors
    )


def run_prepared(key: tuple, fresh: Mapping[str, Any], make: Callable[[], Launch]) -> None:
    """Run a launch, prepared if one with the same key has run before.

    Args:
        key: Everything that decides kernel, grid and arguments except ``fresh``; the device too.
        fresh: Arguments that are new each time, in one order: every tensor, every number that is
            neither in the key nor follows from it.
        make: Describes the whole launch, for the first time.
    """
    prepared = _prepared.get(key)
    if prepared is not None:
        prepared.run(fresh.values())
        return
    launch = make()
    kernel = launch.run()
    if isinstance(kernel, CompiledKernel):
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = _Prepared(kernel, launch, fresh)


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


def seed_number(seed: Tensor) -> int:
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

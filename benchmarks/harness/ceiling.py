"""What a machine allows at best: the vendor's figures for a known GPU, else a GEMM and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from ila_kernels.roofline import Ceiling, ceiling_of

GEMM_SIZES = (512, 1024, 2048)
COPY_BYTES = 2**28
REPEATS = 7


@cache
def ceiling(device: torch.device, dtype: torch.dtype) -> tuple[Ceiling, str]:
    """The ceiling, and where it comes from: ``"data sheet"`` or ``"measured"``.

    Measured is the best of a plain product and of a copy of 256 MiB (read and written), not the
    median: it is to be an upper bound. What fits into a cache can be faster than that copy.
    """
    if device.type == "cuda":
        known = ceiling_of(torch.cuda.get_device_name(device))
        if known is not None:
            return known, "data sheet"
    speeds = []
    for size in GEMM_SIZES:
        a = torch.ones(size, size, dtype=dtype, device=device)
        speeds.append(2 * size**3 / _best(lambda a=a: torch.mm(a, a), device))
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * COPY_BYTES / _best(lambda: target.copy_(source), device)
    return Ceiling(max(speeds) / 1e12, moved / 1e9), "measured"


def _best(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)

"""Peak bytes of the tensors that a call allocates, over what was there before.

A GPU's allocator counts them. On a CPU torch's profiler records each allocation and release, which
is exact where the resident set of a process is not: freed blocks stay resident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_tensor_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Run once and count."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _, _, peak = allocated(run)
    return peak


def allocated(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """What ``run`` returns, the bytes it left allocated on the CPU, and the most that it had."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    # At one instant a release sorts before an allocation; a realloc is one tensor, not two.
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return result, now, peak

"""Whether somebody else used the machine while it was measured.

A fixed product of two matrices is timed before and after every cell. On a quiet machine it takes
the same time again and again; its spread goes into every result file and is said aloud when it is
wide. The load average counts too, but only as it was before this process began to compute.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness.timing import quantile

SIZE, REPEATS = 512, 7
# p90/p10 of the calibration on 2 quiet cores was at most 1.1; with a second process it is 1.5 to 2.
WIDE = 1.2
# Share of the cores that others kept busy in the minute before.
LOADED = 0.4


@dataclass
class Busy:
    """Calibration times of one result file, and the load average before the run."""

    device: torch.device
    load_before: float | None
    times_ms: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Time the product a few times."""
        a = torch.ones(SIZE, SIZE, device=self.device)
        for turn in range(REPEATS + 1):
            begin = time.perf_counter()
            torch.mm(a, a)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if turn:  # the first one wakes the threads
                self.times_ms.append((time.perf_counter() - begin) * 1e3)

    def as_dict(self) -> dict[str, Any]:
        """What was seen and the verdict, for JSON."""
        p10, p90 = quantile(self.times_ms, 0.1), quantile(self.times_ms, 0.9)
        edge = max(1, len(self.times_ms) // 4)
        first, last = self.times_ms[:edge], self.times_ms[-edge:]
        found = {
            "load_average_before": self.load_before,
            "cores": os.cpu_count() or 1,
            "calibration": f"fp32 product of {SIZE}, {len(self.times_ms)} times",
            "calibration_median_ms": quantile(self.times_ms, 0.5),
            "calibration_p10_ms": p10,
            "calibration_p90_ms": p90,
            "spread": p90 / p10,
            "drift": quantile(last, 0.5) / quantile(first, 0.5),
        }
        return found | {"busy": bool(reasons(found)), "why": reasons(found)}


def load_average() -> float | None:
    """Of the last minute, where the system knows one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def reasons(found: dict[str, Any]) -> list[str]:
    """Say what speaks for a busy machine; nothing, for a quiet one.

    >>> reasons({"spread": 1.05, "drift": 1.0, "load_average_before": 0.1, "cores": 2})
    []
    """
    said = []
    load = found["load_average_before"]
    if load is not None and load > LOADED * found["cores"]:
        said.append(f"the load average was {load:.1f} on {found['cores']} cores before it began")
    if found["spread"] > WIDE:
        said.append(f"the same product took {found['spread']:.2f} times as long at p90 as at p10")
    if not 1 / WIDE < found["drift"] < WIDE:
        said.append(f"it took {found['drift']:.2f} times as long at the end as at the beginning")
    return said

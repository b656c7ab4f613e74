"""Time of each training step and peak memory, over all parts of a resumed run."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ila.runs.atomic import write_json_atomic
from ila.runs.metrics import Measured, StepTime
from ila.runs.records import COUNT, Field, is_number, or_null, read_record

_FIELDS = {
    "times_ms": Field(
        "a list of numbers", lambda v: isinstance(v, list) and all(map(is_number, v))
    ),
    "peak_memory_bytes": or_null(COUNT),
}


class StepMeter(TrainerCallback):
    """Measure wall time of each optimiser step in ms, forward to update, and peak memory.

    Checkpoints keep both, so that a resumed run reports all of its parts: the times of every step
    and the highest of the peaks. Steps after the last checkpoint of a killed run are run again.
    """

    FILE = "costs.json"
    WARM_UP = 3

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times_ms: list[float] = []
        self.earlier_peak: int | None = 0
        self.can_measure = False

    def begin(self) -> None:
        """Start to measure memory."""
        self.can_measure = reset_peak(self.device)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self._wait(args)
        self.began = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self._wait(args)
        self.times_ms.append((time.perf_counter() - self.began) * 1e3)

    @staticmethod
    def _wait(args: TrainingArguments) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)

    def peak_memory_bytes(self) -> int | None:
        """Return the highest peak of all parts since ``begin``; None if one is unknown."""
        peak = peak_bytes(self.device) if self.can_measure else None
        return None if peak is None or self.earlier_peak is None else max(self.earlier_peak, peak)

    def step_time_ms(self) -> StepTime:
        """Return median, 10th and 90th percentile in ms, without the first steps (warm-up)."""
        times = sorted(self.times_ms[self.WARM_UP :] or self.times_ms)
        last = len(times) - 1
        return {
            "median": times[round(0.5 * last)],
            "p10": times[round(0.1 * last)],
            "p90": times[round(0.9 * last)],
        }

    def measured(self) -> Measured:
        """Return both measurements under their names in ``metrics.json``."""
        peak = self.peak_memory_bytes()
        return {"step_time_ms": self.step_time_ms(), "peak_memory_bytes": peak}

    def save(self, folder: Path) -> None:
        """Write the measurements into a checkpoint."""
        measured = {"times_ms": self.times_ms, "peak_memory_bytes": self.peak_memory_bytes()}
        write_json_atomic(folder / self.FILE, measured)

    def load(self, folder: Path) -> None:
        """Read the measurements up to a checkpoint."""
        measured = read_record(folder / self.FILE, _FIELDS)
        self.times_ms = measured["times_ms"]
        self.earlier_peak = measured["peak_memory_bytes"]


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> bool:
    """Start measuring; return False where the peak of this process cannot be reset.

    On CUDA the allocator counts. On a CPU under Linux the kernel keeps the high mark of the
    resident set, and writing 5 to ``clear_refs`` lowers the mark to the resident bytes of now.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes since ``reset_peak``: allocated on CUDA, resident on a CPU, or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _STATUS.exists():
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None

"""Steps in their order, one deadline for all, and nothing lost of a step that is cut off.

A step runs in a process of its own and writes its file whole, again and again as it goes on. So a
step that fails, hangs or meets the deadline leaves what it had, and the next one is not concerned.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

GRACE_S = 3.0

# Runs a step for at most so many seconds: its exit status, or None if it was cut off.
Runner = Callable[["Step", float], int | None]


@dataclass(frozen=True)
class Step:
    """One step of the day.

    Attributes:
        name: Of the step.
        file: Its result file.
        least_s: With fewer seconds left it is not begun.
        most_s: It is cut off after so many.
    """

    name: str
    file: str
    least_s: float
    most_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of a step: ``"done"``, ``"failed"``, ``"cut off"`` or ``"left out"``."""

    step: str
    file: str
    state: str
    seconds: float
    why: str = ""

    def __str__(self) -> str:
        return f"{self.step}: {self.state} after {self.seconds:.0f} s" + f": {self.why}" * bool(
            self.why
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def run_day(
    steps: Sequence[Step],
    seconds: float,
    run: Runner,
    report: Callable[[Sequence[Outcome]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the steps that fit before the deadline; ``report`` gets all outcomes after each step."""
    begin, outcomes = clock(), []
    for step in steps:
        left = seconds - (clock() - begin)
        if left < step.least_s:
            why = f"it needs {step.least_s:.0f} s, and {max(left, 0.0):.0f} s are left"
            outcomes.append(Outcome(step.name, step.file, "left out", 0.0, why))
        else:
            outcomes.append(_run_one(step, min(step.most_s, left), run, clock))
        report(outcomes)
    return outcomes


def _run_one(step: Step, limit_s: float, run: Runner, clock: Callable[[], float]) -> Outcome:
    begin = clock()
    try:
        status = run(step, limit_s)
    except OSError as error:
        state, why = "failed", str(error)
    else:
        if status is None:
            state, why = "cut off", f"at its limit of {limit_s:.0f} s; {step.file} has the rest"
        else:
            state, why = ("done", "") if status == 0 else ("failed", f"exit status {status}")
    return Outcome(step.name, step.file, state, clock() - begin, why)


def run_limited(command: Sequence[str], limit_s: float) -> int | None:
    """Run a command and end it, and what it started, after ``limit_s`` seconds."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(max(limit_s - GRACE_S, 0.0))
    except subprocess.TimeoutExpired:
        _end(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return None
    finally:
        _end(process, signal.SIGKILL)
        process.wait()


def _end(process: subprocess.Popen, how: signal.Signals) -> None:
    """Send a signal to a process and to all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)

"""Time of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import table

TITLE = "Time of a training step"
ORDER = 10
FILES = ("step-time", "step-time-top")


def speeds(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the step-time table: one per contestant."""
    return [
        [name, f"{row['speed_relative_to_peft']:.2f}", f"{row['p10']:.2f}–{row['p90']:.2f}"]
        for name, row in result["rows"].items()
    ]


def step_times(result: Mapping[str, Any]) -> list[str]:
    """Say how a step was timed, and the table."""
    options, environment = result["options"], result["environment"]
    where = "the last layers by position" if options["top"] else "the layers that a mask chose"
    clock = "CPU time" if options["clock"] == "cpu" else "Time"
    return [
        f"**{clock} of a training step**, forward and backward; open are {where}. "
        f"{options['model']}, {options['dtype'].removeprefix('torch.')}, "
        f"{options['rows']}×{options['tokens']} tokens, "
        f"{environment['device'].upper()}, threads: {environment['threads']}, "
        f"{options['rounds']} interleaved rounds "
        "(`python -m benchmarks.step_time`): how many times as fast as PEFT with all layers.",
        table(["", "times as fast", "p10–p90"], speeds(result)),
    ]


def markdown(found: Mapping[str, Any]) -> list[str]:
    return [part for name in FILES if name in found for part in step_times(found[name])]


summary = markdown

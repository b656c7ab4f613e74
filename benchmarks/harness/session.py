"""One run of ``pytest benchmarks``: options, gates passed, cells measured, files written.

A *cell* is what is measured in one interleaved run: a name, contestants, a gate and a measurement.
A test file lists its cells; conftest.py makes a test of each gate, all of which run first, and one
of each contestant, of which a cell's first measures them all.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.harness.busy import Busy, load_average
from benchmarks.harness.gate import GateRedError
from benchmarks.harness.timing import Watch
from ila.commands.inputs import versions
from ila.runs.atomic import write_json_atomic

Row = dict[str, Any]
ALLOCATORS, SYSTEM_ALLOCATOR = ("tcmalloc", "jemalloc", "mimalloc"), "the system's"
SIZES = ("smoke", "quick", "full")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    Attributes:
        size: ``"smoke"`` (tiny, to try the harness), ``"quick"`` (the default) or ``"full"``.
        clock: ``"wall"`` or ``"cpu"``; a GPU is always timed with its own events.
        attention: transformers' name of the attention of every model; None for the model's own.
        rounds: Interleaved rounds; ``None`` leaves it to the benchmark.
        model: Folder, hub id or GGUF file; ``None`` unpacks the model of ``ila demo``.
        data: File of instruction rows.
        mask: A mask of that model, as ``ila learn`` writes it; ``None`` leaves its cells out.
        batch: Rows and tokens of a training step, for a file of its own; ``None`` for the usual.
        scratch: Where the demo's model is unpacked and states are cached.
    """

    size: str = "quick"
    clock: str = "wall"
    attention: str | None = None
    rounds: int | None = None
    model: str | None = None
    data: Path | None = None
    mask: Path | None = None
    batch: tuple[int, int] | None = None
    scratch: Path = Path(".benchmarks")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def watch(self) -> Watch:
        return Watch(self.device, self.clock)

    def pick(self, *, smoke: Any, quick: Any, full: Any) -> Any:
        """The value for the size asked for."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.size]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; of paths the names."""
        named = {
            key: None if value is None else Path(value).name
            for key, value in (("model", self.model), ("data", self.data), ("mask", self.mask))
        }
        clock = "events" if self.device.type == "cuda" else self.clock
        return {"size": self.size, "clock": clock, "rounds": self.rounds, **named}


class Cell(Protocol):
    """What is measured side by side."""

    name: str
    contestants: Sequence[str]

    def check(self) -> None:
        """Raise if a contestant computes something else."""

    def measure(self) -> tuple[list[Row], Mapping[str, list[float]]]:
        """Rows, and the seconds of every round by contestant."""

    def conditions(self) -> dict[str, Any]:
        """What the cell ran under and the options do not say: rounds, sizes, dtype."""


@dataclass
class Session:
    """What has been found so far."""

    options: Options
    results: Path
    files: dict[str, Sequence[Cell]] = field(default_factory=dict)
    red: list[str] = field(default_factory=list)
    green: set[int] = field(default_factory=set)
    rows: dict[int, list[Row]] = field(default_factory=dict)
    seconds: dict[int, Mapping[str, list[float]]] = field(default_factory=dict)
    busy: dict[str, Busy] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)
    # Before this process computes: later its own work would count.
    load_before: float | None = field(default_factory=load_average)

    def gate(self, cell: Cell) -> None:
        """Check a cell once.

        Raises:
            GateRedError: If a contestant of it computes something else.
        """
        if id(cell) in self.green:
            return
        try:
            cell.check()
        except Exception as error:  # an assertion, or code too broken to get that far
            self.red.append(f"{cell.name}: {type(error).__name__}: {error}")
            raise GateRedError(f"{self.red[-1]}; nothing is measured or written") from error
        self.green.add(id(cell))

    def measure(self, file: str, cell: Cell) -> None:
        """Measure a cell once, behind its gate."""
        if self.red:
            raise GateRedError(f"a gate is red: {self.red[0]}")
        self.gate(cell)
        if id(cell) in self.rows:
            return
        if file not in self.busy:
            self.busy[file] = Busy(self.options.device, self.load_before)
        busy = self.busy[file]
        busy.sample()
        rows, self.seconds[id(cell)] = cell.measure()
        busy.sample()
        self.rows[id(cell)] = [{"cell": cell.name, **row} for row in rows]

    def is_complete(self, file: str) -> bool:
        """Whether every cell of a file is measured and no gate is red."""
        return not self.red and all(id(cell) in self.rows for cell in self.files[file])

    def document(self, file: str) -> dict[str, Any]:
        """A result file's content."""
        cells = self.files[file]
        return {
            "environment": environment(self.options.device),
            "options": self.options.as_dict(),
            "cells": {cell.name: cell.conditions() for cell in cells},
            "busy": self.busy[file].as_dict(),
            "rows": [row for cell in cells for row in self.rows[id(cell)]],
        }

    def write(self) -> None:
        """Write the files that are complete.

        Those of another batch, and of a GPU, have names of their own.
        """
        batch = self.options.batch
        suffix = "" if batch is None else f"-{batch[0]}x{batch[1]}"
        suffix += "-gpu" if self.options.device.type == "cuda" else ""
        for file, cells in self.files.items():
            if cells and self.is_complete(file):
                self.results.mkdir(parents=True, exist_ok=True)
                self.written.append(self.results / f"{file}{suffix}.json")
                write_json_atomic(self.written[-1], self.document(file))


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions; no names of hosts or people."""
    found = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processor": processor(),
        "allocator": allocator(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {"versions": versions()}


def processor() -> str:
    """Return the name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def allocator() -> str:
    """Return the name of the library whose ``malloc`` this process uses.

    The system's may ask for fresh pages for every large tensor, which the processor then clears:
    time that depends on the machine, and hits whoever allocates most.
    """
    maps = Path("/proc/self/maps")
    loaded = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    return next((name for name in ALLOCATORS if f"lib{name}" in loaded), SYSTEM_ALLOCATOR)

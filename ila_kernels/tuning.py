"""Measure the implementations on this machine's GPU, so that ``impl="auto"`` can choose by that.

``tune`` measures and keeps verdicts, ``use_verdicts`` reads the verdicts of earlier processes. Only
``tune`` measures, and only these two functions read files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed

from ila_kernels import store
from ila_kernels.choice import nothing_preferred, set_verdicts, verdicts_in_use
from ila_kernels.device import dtype_name, is_capturing, machine_of
from ila_kernels.measuring import CudaTimer, Timer, measure
from ila_kernels.verdict import Cell, Machine, Verdict, Verdicts

Shape = tuple[int, int | Sequence[int]]
Progress = Callable[[int, int, str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Tuned:
    """The result of ``tune``; printed, it is a table.

    Attributes:
        verdicts: One for each kind of call that was measured.
        skipped: Kinds of calls that eager itself could not run, with the reason.
        folder: Where the verdicts are kept; ``None`` if only this process has them.
        not_kept: The reason for that.
    """

    verdicts: tuple[Verdict, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    not_kept: str = ""

    def __str__(self) -> str:
        lines = [str(verdict) for verdict in self.verdicts]
        lines += [f"{cell}: not measured: {why}" for cell, why in self.skipped.items()]
        if self.folder is not None:
            lines.append(f"kept in {self.folder}")
        elif self.verdicts:
            lines.append(f"not kept, for this process only: {self.not_kept}")
        return "\n".join(lines)


def tune(
    shapes: Iterable[Shape],
    *,
    rank: int = 16,
    rows: Sequence[int] = (2048, 8192),
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    rounds: int = 7,
    device: torch.device | str | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Measure kinds of calls on a GPU, keep the verdicts, and let ``impl="auto"`` use them.

    Takes seconds of GPU time, and once the time to compile the kernels. Where torch.distributed is
    initialised every process has to call it: the main one measures and the others receive.

    Args:
        shapes: (K, N) of a layer, or (K, (N₁, N₂, …)) of layers of one x, such as q, k and v.
        rank: R of the adapters.
        rows: Numbers of tokens M. A verdict holds for up to four times more or fewer.
        dtype: Dtype of x and W.
        adapter_dtype: Dtype of A and B.
        dropout_p: Dropout of the adapters; a verdict holds with dropout or without.
        rounds: Interleaved rounds, at least 7.
        device: The GPU; the current one if ``None``.
        timer: Runs a step and returns its milliseconds; the GPU's own clock if ``None``.
        progress: Called with (done, all, kind of call) before each measurement.

    Returns:
        The verdicts; ``str()`` of it is a table.

    Raises:
        RuntimeError: If there is no GPU, or under ``torch.compile`` or a CUDA graph's capture.
        ValueError: If a number is out of range.
    """
    if device is None and not torch.cuda.is_available():
        raise RuntimeError("tune measures on a GPU, and PyTorch sees none: nothing was measured")
    if torch.compiler.is_compiling() or is_capturing():
        raise RuntimeError("tune cannot run under torch.compile or while a CUDA graph is captured")
    if rounds < 7:
        raise ValueError(f"rounds must be at least 7, got {rounds}")
    device = _gpu(device)
    kind = (rank, dtype_name(dtype), dtype_name(adapter_dtype), dropout_p > 0.0)
    cells = [_cell(shape, m, kind) for shape in shapes for m in rows]

    def measured() -> tuple[Machine, Tuned]:
        clock = CudaTimer(device) if timer is None else timer

        def one(cell: Cell) -> Verdict:
            return measure(cell, dropout_p, device, clock, rounds)

        return machine_of(device), _measure_and_keep(cells, one, progress)

    with nothing_preferred():
        machine, tuned = on_main_process(measured)
    _use(machine, [*verdicts_in_use().all, *tuned.verdicts], device)
    return tuned


def _gpu(device: torch.device | str | None) -> torch.device:
    """Name a GPU with its index, as tensors on it do."""
    device = torch.device("cuda" if device is None else device)
    if device.index is None and torch.cuda.is_available():
        return torch.device(device.type, torch.cuda.current_device())
    return device


def _cell(shape: Shape, m: int, kind: tuple[int, str, str, bool]) -> Cell:
    k, n = shape
    ns = (n,) if isinstance(n, int) else tuple(n)
    if not ns or min(m, k, kind[0], *ns) < 1:
        raise ValueError(f"rows, K, N and rank must be positive, got {m}, {k}, {n} and {kind[0]}")
    return Cell(m, k, ns, *kind)


def _measure_and_keep(
    cells: Sequence[Cell], measure_one: Callable[[Cell], Verdict], progress: Progress | None
) -> Tuned:
    """Measure each cell and write its verdict at once, so that an interrupted run keeps the rest.

    If a file cannot be written, the verdicts stay in memory only.
    """
    verdicts: list[Verdict] = []
    skipped: dict[str, str] = {}
    folder, not_kept = None, ""
    for done, cell in enumerate(cells):
        if progress is not None:
            progress(done, len(cells), str(cell))
        try:
            verdicts.append(measure_one(cell))
            folder = store.save(verdicts[-1:]) if not not_kept else None
        except RuntimeError as error:
            skipped[str(cell)] = str(error).splitlines()[0]
        except OSError as error:
            folder, not_kept = None, str(error)
    return Tuned(tuple(verdicts), skipped, folder, not_kept)


def use_verdicts(
    verdicts: Iterable[Verdict | Mapping[str, object]] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Verdict, ...]:
    """Let ``impl="auto"`` choose by earlier measurements, in place of those in use.

    Call it before ``torch.compile`` traces a model. Where torch.distributed is initialised and
    ``verdicts`` is ``None`` every process has to call it: the main one reads, the others receive.

    Args:
        verdicts: Verdicts, or their ``to_json()`` as a run records them. ``None`` takes the
            verdicts that ``tune`` kept for this machine; without a GPU it takes none.
        device: GPU of the verdicts; ``None`` takes the current one.

    Returns:
        The verdicts in use.

    Raises:
        ValueError: If an entry is not a verdict.

    >>> use_verdicts([])
    ()
    """
    if verdicts is not None:
        given = (v if isinstance(v, Verdict) else Verdict.from_json(v) for v in verdicts)
        set_verdicts(Verdicts(given))
    elif device is None and not torch.cuda.is_available():
        set_verdicts(Verdicts())
    else:
        on = _gpu(device)

        def read() -> tuple[Machine, list[Verdict]]:
            machine = machine_of(on)
            return machine, store.load(machine)

        machine, found = on_main_process(read)
        _use(machine, found, on)
    return verdicts_in_use().all


def _use(machine: Machine, verdicts: Iterable[Verdict], device: torch.device) -> None:
    """Use the verdicts of the main process, unless this process runs on another machine."""
    own = machine_of(device)
    if own != machine:
        warnings.warn(
            f"the main process measured on {machine}; this one runs on {own}, where "
            "impl='auto' takes library GEMMs",
            RuntimeWarning,
            stacklevel=3,
        )
        verdicts = ()
    set_verdicts(Verdicts(verdicts))


def on_main_process(make: Callable[[], T]) -> T:
    """Run ``make`` on the main process and return its result on every one.

    Raises:
        RuntimeError: On the other processes, if it raised on the main one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return make()
    main, box = distributed.get_rank() == 0, [None, ""]
    fault = None
    if main:
        try:
            box = [make(), ""]
        except Exception as error:
            fault, box = error, [None, f"{type(error).__name__}: {error}"]
    distributed.broadcast_object_list(box, src=0)
    result, message = box
    if fault is not None:
        raise fault
    if message:
        raise RuntimeError(f"the main process failed: {message}")
    return result

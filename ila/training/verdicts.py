"""The measurements by which ``impl="auto"`` chooses, of a run: a file in its folder.

Another choice rounds otherwise, so a resumed run goes on with the verdicts that it began with, even
if ``ila tune`` has measured since.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ila.models.untuned import say_untuned
from ila.runs.atomic import write_json_atomic
from ila.runs.processes import on_main_process, processes
from ila.runs.records import Field, read_record
from ila_kernels import use_verdicts, verdicts_in_use

if TYPE_CHECKING:
    from ila_kernels.verdict import Verdict

_LOG = logging.getLogger(__name__)

FILE = "verdicts.json"
_FIELDS = {"verdicts": Field("a list", lambda value: isinstance(value, list))}


def record() -> list[dict[str, object]]:
    """Return the verdicts in use as plain data."""
    return [verdict.to_json() for verdict in verdicts_in_use().all]


def settle_verdicts(device: torch.device, folder: Path) -> None:
    """Let ``impl="auto"`` choose by the verdicts of a run; all processes call this.

    The verdicts in the folder replace the verdicts in use. A new run writes the verdicts in use
    into its folder; if there is no such verdict it reads the verdicts of ``ila tune`` before.

    Args:
        device: Device of the model.
        folder: Folder of the run.

    Raises:
        ValueError: The file in the folder is damaged.
    """
    file = folder / FILE
    known = on_main_process(lambda: read_record(file, _FIELDS) if file.exists() else None)
    now = verdicts_in_use().all or use_verdicts()
    if known is not None:
        _go_on_with(known["verdicts"], now, file)
        return
    if not now and device.type == "cuda" and processes().is_main_process:
        say_untuned(device)
    if now or device.type == "cuda":
        on_main_process(lambda: write_json_atomic(file, {"verdicts": record()}))


def _go_on_with(recorded: list[dict[str, object]], now: Sequence[Verdict], file: Path) -> None:
    try:
        then = use_verdicts(recorded)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if _choices(now) != _choices(then) and processes().is_main_process:
        _LOG.warning(
            f"The run goes on with the {len(then)} measurements of kernels that it began with; "
            f"the {len(now)} that this machine has now are left alone"
        )


def _choices(verdicts: Sequence[Verdict]) -> set[tuple[object, ...]]:
    return {(v.machine.gpu, v.cell, v.pick(), v.pick("pointer")) for v in verdicts}

"""Verdicts on disk, one file each, in the user's cache folder.

    <cache>/ila_kernels/verdicts/<digest of the machine>/<cell>.json

A file is written whole or not at all. Reading refuses nothing: a damaged file, or one of another
machine or version, counts as not measured, and one warning names it.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from ila_kernels.verdict import Cell, Machine, Verdict


def folder_of(machine: Machine) -> Path:
    """Return the folder of a machine's verdicts; it need not exist."""
    from platformdirs import user_cache_path

    return user_cache_path("ila_kernels", appauthor=False) / "verdicts" / machine.digest()


def _name(cell: Cell) -> str:
    widths = "+".join(map(str, cell.ns))
    dropout = "-dropout" if cell.dropout else ""
    dtypes = f"{cell.dtype}-{cell.adapter_dtype}"
    return f"k{cell.k}-n{widths}-r{cell.r}-rows{cell.rows}-{dtypes}{dropout}.json"


def save(verdicts: Iterable[Verdict]) -> Path | None:
    """Write verdicts of one machine and return their folder; ``None`` without verdicts.

    Raises:
        OSError: If the folder cannot be written to.
    """
    folder = None
    for verdict in verdicts:
        folder = folder_of(verdict.machine)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _name(verdict.cell), json.dumps(verdict.to_json(), indent=1) + "\n")
    return folder


def _write(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(machine: Machine) -> list[Verdict]:
    """Read the verdicts of a machine; leave out unusable ones, with one warning."""
    verdicts, faults = [], []
    folder = folder_of(machine)
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError as error:
        paths, faults = [], [str(error)]
    for path in paths:
        try:
            verdict = Verdict.from_json(json.loads(path.read_text(encoding="utf-8")))
            if verdict.machine != machine:
                raise ValueError(f"it was measured on {verdict.machine}")
        except (OSError, ValueError) as error:  # JSON's and UTF-8's errors are ValueErrors
            faults.append(f"{path.name}: {error}")
        else:
            verdicts.append(verdict)
    if faults:
        warnings.warn(
            f"{len(faults)} verdicts in {folder} count as not measured: {'; '.join(faults)}; "
            "ila_kernels.tune() writes new ones",
            RuntimeWarning,
            stacklevel=2,
        )
    return verdicts

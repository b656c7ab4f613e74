"""Checkpoints that survive a kill: a run resumes from the newest *complete* one.

Trainer writes a checkpoint folder file by file. A marker, written last, names every file with its
size and checksum. A folder without a marker, or with a file of another content, was cut off by a
kill or a power failure, or damaged since; the run then takes the checkpoint before it.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ila.runs.atomic import sync_tree, write_json_atomic
from ila.runs.processes import processes

MARKER = "complete.json"
LOGS = "logs"  # of other libraries, in the folder of a run
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def last_complete(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step in ``folder``, or None."""
    numbered = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(path.name)
        if match and _is_whole(path):
            numbered.append((int(match[1]), path))
    return max(numbered)[1] if numbered else None


def keep_logs(folder: Path, target: Path) -> None:
    """Move all files except checkpoints out of a folder before its removal.

    Args:
        folder: Folder of Trainer; other libraries put their reports below it.
        target: New folder of the reports.
    """
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder)
        if path.is_file() and not _NUMBERED.fullmatch(name.parts[0]):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(target / name)


def is_finished(checkpoint: Path) -> bool:
    """Tell whether training was at its end when it wrote this checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop", False))


def _is_whole(checkpoint: Path) -> bool:
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        if marker["files"] != _sizes(checkpoint):
            return False
        # Markers of earlier versions hold no checksums.
        return marker.get("crc32", {}) in ({}, _checksums(checkpoint))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file except the marker."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER:
            yield path.relative_to(folder).as_posix(), path


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file."""
    return {name: path.stat().st_size for name, path in _files(folder)}


def _checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of every file."""
    return {name: _checksum(path) for name, path in _files(folder)}


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            total = zlib.crc32(part, total)
    return total


class MarkComplete(TrainerCallback):
    """Write the marker into each checkpoint after all other files.

    Args:
        also: Adds files to the checkpoint folder, before the marker.
    """

    def __init__(self, also: Callable[[Path], object] | None = None):
        self.also = also

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        processes().wait_for_everyone()  # each process writes a random state of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.also is not None:
            self.also(folder)
        mark_complete(folder, state.global_step)


def mark_complete(folder: Path, step: int) -> None:
    """Write the marker of a whole checkpoint.

    Its files reach the disk first: a power failure must not keep the marker alone.
    """
    sync_tree(folder)
    marker = {"step": step, "files": _sizes(folder), "crc32": _checksums(folder)}
    write_json_atomic(folder / MARKER, marker)

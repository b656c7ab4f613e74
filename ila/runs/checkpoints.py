"""Checkpoints that survive being killed: the newest *complete* one is resumed.

Trainer writes a checkpoint folder file by file. A marker written last names every file with its
size and checksum; a folder without it, or with a file that holds something else, was cut off by a
kill or a power failure, or damaged since. It is passed over, and the one before it is used.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import TrainerCallback

from ila.runs.atomic import sync_tree, write_json_atomic
from ila.runs.processes import processes

MARKER = "complete.json"
LOGS = "logs"  # of other libraries, in the folder of a run
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def last_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in ``folder``, or None."""
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(path.name)
        if match and _is_whole(path):
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


def keep_logs(folder: Path, target: Path) -> None:
    """Move what is no checkpoint out of a folder of checkpoints, before that is removed.

    Args:
        folder: Where Trainer wrote; the reports of other libraries go below it.
        target: Where they are kept.
    """
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder)
        if path.is_file() and not _NUMBERED.fullmatch(name.parts[0]):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(target / name)


def is_finished(checkpoint: Path) -> bool:
    """Whether training had come to its end when this checkpoint was written."""
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
    """Every file but the marker."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER:
            yield path.relative_to(folder).as_posix(), path


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file."""
    return {name: path.stat().st_size for name, path in _files(folder)}


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file."""
    return {name: _checksum(path) for name, path in _files(folder)}


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            total = zlib.crc32(part, total)
    return total


class MarkComplete(TrainerCallback):
    """Writes the marker into each checkpoint once Trainer has written everything else.

    Args:
        also: Called with the checkpoint folder before the marker is written, to add files to it.
    """

    def __init__(self, also: Callable[[Path], object] | None = None):
        self.also = also

    def on_save(self, args, state, control, **kwargs):
        processes().wait_for_everyone()  # each process writes a random state of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.also is not None:
            self.also(folder)
        mark_complete(folder, state.global_step)


def mark_complete(folder: Path, step: int) -> None:
    """Write the marker of a checkpoint that is whole.

    Its files reach the disk first, so that a power failure keeps both or neither.
    """
    sync_tree(folder)
    marked = {"step": step, "files": _sizes(folder), "crc32": _checksums(folder)}
    write_json_atomic(folder / MARKER, marked)

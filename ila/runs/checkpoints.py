"""Checkpoints that survive a kill: a run resumes from the newest *complete* one.

Trainer writes a checkpoint folder file by file. A marker, written last, names every file with its
size. A folder without a marker, or with a file of another size, was cut off by a kill or a power
failure; the run then takes the checkpoint before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ila.runs.atomic import sync_tree, write_json_atomic
from ila.runs.processes import processes

MARKER = "complete.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def last_complete(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step in ``folder``, or None."""
    numbered = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(path.name)
        if match and _is_whole(path):
            numbered.append((int(match[1]), path))
    return max(numbered)[1] if numbered else None


def is_finished(checkpoint: Path) -> bool:
    """Tell whether training was at its end when it wrote this checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop", False))


def _is_whole(checkpoint: Path) -> bool:
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return marker["files"] == _sizes(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file except the marker."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


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
        # The files before the marker: a power failure must not keep the marker alone.
        sync_tree(folder)
        write_json_atomic(folder / MARKER, {"step": state.global_step, "files": _sizes(folder)})

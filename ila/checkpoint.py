"""Checkpoints that survive being killed: the newest *complete* one is resumed.

Trainer writes a checkpoint folder file by file. A marker written last says that nothing is
missing; a folder without it was cut off, and the one before it is used.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import TrainerCallback

from ila.files import write_json_atomic

MARKER = "complete.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def last_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in ``folder``, or None."""
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(path.name)
        if match and (path / MARKER).is_file():
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


class MarkComplete(TrainerCallback):
    """Writes the marker into each checkpoint once Trainer has written everything else.

    Args:
        also: Called with the checkpoint folder before the marker is written, to add files to it.
    """

    def __init__(self, also=None):
        self.also = also

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.also is not None:
            self.also(folder)
        write_json_atomic(folder / MARKER, {"step": state.global_step})

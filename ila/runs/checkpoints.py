"""Checkpoints that survive being killed: the newest *complete* one is resumed.

Trainer writes a checkpoint folder file by file. A marker written last names every file with its
size; a folder without it, or with a file that has another size, was cut off by a kill or a power
failure, and the one before it is used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from peft import PeftModel
from peft.utils import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerCallback

from ila.runs.atomic import sync_tree, write_json_atomic
from ila.runs.processes import processes, whole

MARKER = "complete.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def last_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in ``folder``, or None."""
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(path.name)
        if match and _is_whole(path):
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


def is_finished(checkpoint: Path) -> bool:
    """Whether training had come to its end when this checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop", False))


def whole_state(peft_model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The model's state dict with the tensors of one adapter gathered; called by all processes."""
    state = peft_model.state_dict()
    # What PEFT would save of it, by PEFT's own rules; they change names but not the tensors.
    saved = get_peft_model_state_dict(peft_model, state_dict=dict(state), adapter_name=adapter)
    wanted = {id(tensor) for tensor in saved.values()}
    return {name: whole(t) if id(t) in wanted else t for name, t in state.items()}


def save_adapter(
    peft_model: PeftModel, adapter: str, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write one adapter into ``folder`` itself; PEFT gives all but "default" a subfolder.

    Args:
        peft_model: The model.
        adapter: Name of the adapter.
        folder: An empty folder.
        state: From ``whole_state``; needed where the model is sharded.
    """
    peft_model.save_pretrained(folder, selected_adapters=[adapter], state_dict=state)
    if adapter != "default":
        for path in (folder / adapter).iterdir():
            path.replace(folder / path.name)
        (folder / adapter).rmdir()


def load_adapter(peft_model: PeftModel, adapter: str, folder: Path) -> None:
    """Read what ``save_adapter`` wrote into a model that has this adapter.

    Raises:
        ValueError: If the weights are damaged.
    """
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except SafetensorError as error:
        raise ValueError(f"the adapter in {folder} is damaged: {error}") from error
    set_peft_model_state_dict(peft_model, weights, adapter_name=adapter)


def _is_whole(checkpoint: Path) -> bool:
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return marker["files"] == _sizes(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file but the marker."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


class MarkComplete(TrainerCallback):
    """Writes the marker into each checkpoint once Trainer has written everything else.

    Args:
        also: Called with the checkpoint folder before the marker is written, to add files to it.
    """

    def __init__(self, also=None):
        self.also = also

    def on_save(self, args, state, control, **kwargs):
        processes().wait_for_everyone()  # each process writes a random state of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.also is not None:
            self.also(folder)
        sync_tree(folder)  # or the marker could outlive a power failure, and what it marks not
        write_json_atomic(folder / MARKER, {"step": state.global_step, "files": _sizes(folder)})

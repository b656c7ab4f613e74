"""Turn the last checkpoint of all layers into a checkpoint for the open layers.

Trainer's own resuming then restores the order of the data, the schedule, the random state and the
log.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ila.runs.atomic import write_folder_atomic
from ila.runs.checkpoints import MARKER, mark_complete
from ila.runs.meter import StepMeter

_OPTIMIZER, _STATE = "optimizer.pt", "trainer_state.json"
# Of FSDP with FULL_STATE_DICT: by the names of the parameters.
_NAMED_OPTIMIZER, _NAMED_MODEL = "optimizer.bin", "pytorch_model_fsdp.bin"


def write_switch(
    checkpoint: Path,
    folder: Path,
    names: Sequence[Sequence[str]],
    trained: Mapping[str, bool],
    save: Callable[[Path], None],
) -> Path:
    """Write the first checkpoint of the open layers into ``folder``, whole or not at all.

    Checkpoints that FSDP writes in shards keep the moments of closed layers: torch loads the
    entries of the parameters that are there. Each later checkpoint has the open ones alone.

    Args:
        checkpoint: Last checkpoint of the run with all layers.
        folder: Folder for ``checkpoint-N``.
        names: Names of the parameters in each group of that run's optimiser.
        trained: Name -> whether it trains from now on, for each parameter that the model has.
        save: Writes the adapter, with its mask applied, into a folder.

    Returns:
        The new checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / checkpoint.name
    with write_folder_atomic(target, replace=True) as made:
        shutil.copytree(checkpoint, made, dirs_exist_ok=True)
        (made / MARKER).unlink()
        _filter(made, names, trained)
        save(made)
        _go_on(made / _STATE)
        # Time and memory count the later steps only.
        empty = {"times_ms": [], "peak_memory_bytes": 0}
        (made / StepMeter.FILE).write_text(json.dumps(empty), encoding="utf-8")
        mark_complete(made, int(checkpoint.name.rpartition("-")[2]))
    return target


def _filter(folder: Path, names: Sequence[Sequence[str]], trained: Mapping[str, bool]) -> None:
    """Remove closed layers from the optimiser's state, and parameters that are not there."""
    opened = {name for name, trains in trained.items() if trains}

    def change(name: str, by: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        if (folder / name).exists():
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
            torch.save(by(state), folder / name)

    change(_OPTIMIZER, lambda state: filtered(state, names, opened))
    change(_NAMED_OPTIMIZER, lambda state: filtered_by_name(state, opened))
    change(_NAMED_MODEL, lambda state: {n: t for n, t in state.items() if n in trained})


def _go_on(file: Path) -> None:
    """Remove the mark of the end, which the last step of all layers has set."""
    state = json.loads(file.read_text(encoding="utf-8"))
    control = state["stateful_callbacks"]["TrainerControl"]["args"]
    control |= dict.fromkeys(("should_training_stop", "should_save", "should_epoch_stop"), False)
    file.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def filtered(
    state: Mapping[str, Any], names: Sequence[Sequence[str]], opened: Collection[str]
) -> dict[str, Any]:
    """Return an optimiser's state dict with the open parameters alone, numbered anew.

    >>> group = {"lr": 0.1, "params": [0, 1]}
    >>> state = {"state": {0: "moments of a", 1: "moments of b"}, "param_groups": [group]}
    >>> filtered(state, [["a", "b"]], {"b"})
    {'state': {0: 'moments of b'}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
    """
    moments: dict[int, object] = {}
    groups, count = [], 0
    for group, members in zip(state["param_groups"], names, strict=True):
        pairs = zip(group["params"], members, strict=True)
        kept = [number for number, name in pairs if name in opened]
        groups.append({**group, "params": list(range(count, count + len(kept)))})
        for new, old in enumerate(kept, count):
            if old in state["state"]:
                moments[new] = state["state"][old]
        count += len(kept)
    return {**state, "state": moments, "param_groups": groups}


def filtered_by_name(state: Mapping[str, Any], opened: Collection[str]) -> dict[str, Any]:
    """Return an optimiser's state dict by names, as FSDP writes it, with the open parameters alone.

    >>> state = {"state": {"a": 1, "b": 2}, "param_groups": [{"lr": 0.1, "params": ["a", "b"]}]}
    >>> filtered_by_name(state, {"b"})
    {'state': {'b': 2}, 'param_groups': [{'lr': 0.1, 'params': ['b']}]}
    """
    groups = [
        {**group, "params": [name for name in group["params"] if name in opened]}
        for group in state["param_groups"]
    ]
    moments = {name: entry for name, entry in state["state"].items() if name in opened}
    return {**state, "state": moments, "param_groups": groups}


def optimizer_names(trainer: Trainer) -> list[list[str]]:
    """Return the names of the parameters in each group of a trainer's optimiser."""
    if trainer.optimizer is None:
        trainer.create_optimizer()
    known = {id(p): name for name, p in trainer.model.named_parameters()}
    return [[known[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]

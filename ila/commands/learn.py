"""``ila learn``: learn a mask and write it with its picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from ila.commands.inputs import (
    Inputs,
    Prepared,
    check_folder,
    claim_folder,
    prepare,
    refuse_packed,
)
from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.masks.provenance import Provenance
from ila.models.adalora import set_total_step
from ila.models.open_weights import OpenLayers, open_layers
from ila.reports.figures import can_draw, heatmap
from ila.runs.checkpoints import LOGS, keep_logs
from ila.runs.processes import owning, processes
from ila.runs.records import COUNT, NUMBER, OBJECT, TEXT, check_record, or_null
from ila.search.learn import SearchConfig, learn_mask
from ila.search.stage1 import check_search
from ila.search.weight_updates import WeightUpdates
from ila.training.batches import padding_of
from ila.training.loop import held_out_loss


def learn(
    inputs: Inputs,
    config: SearchConfig,
    out: Path,
    *,
    full: bool = False,
    resume: bool = False,
    progress: bool = True,
    written: Mapping[str, object] | None = None,
) -> tuple[LayerMask, str]:
    """Learn a mask into ``out``: ``mask.json``, ``heatmap.png``, ``log.jsonl``, ``adapter/``.

    ``written`` are the options to write as ``config.yaml``.

    With ``full`` the layers' own weights train and the search scores their changes; it keeps no
    adapter.

    Returns:
        The mask, and a note on the rows.
    """
    config, inputs = replace(config, seed=inputs.seed), inputs.located()
    check_folder(out, inputs, resume, "learn")
    refuse_packed(full, inputs)
    with owning(out):
        return _learn_owned(inputs, config, out, full, resume, progress, written)


def _learn_owned(
    inputs: Inputs,
    config: SearchConfig,
    out: Path,
    full: bool,
    resume: bool,
    progress: bool,
    written: Mapping[str, object] | None,
) -> tuple[LayerMask, str]:
    check_folder(out, inputs, resume, "learn")  # again: it may have had an owner until now
    prepared = prepare(inputs, progress=progress)
    padding = padding_of(prepared.dataset, config)
    note = f"{prepared.note}\n{padding}"
    set_total_step(prepared.model, config.stage1_steps)
    model = open_layers(prepared.model) if full else prepared.model
    description = {**prepared.description, "full": True} if full else prepared.description
    bare = model.model if isinstance(model, OpenLayers) else model
    check_search(config, bare, prepared.dataset, prepared.held_out)
    claim_folder(out, description, resume, "learn", written)
    if resume and (finished := _finished(out, config, full)) is not None:
        return finished, note
    before = _held_out_loss(bare, prepared, config)
    mask = learn_mask(
        model,
        prepared.dataset,
        config,
        collator=prepared.collator,
        output_dir=out,
        resume=resume,
        progress=progress,
        held_out=prepared.held_out,
    )
    after = _held_out_loss(bare, prepared, config)
    held_out = {"before": before, "after_stage1": after, "rows": len(prepared.held_out)}
    provenance = {**description, "search": mask.provenance, "held_out_loss": held_out}
    mask = LayerMask(mask.scores, provenance=provenance)
    if processes().is_main_process:
        _write(mask, out, inputs, config)
    return mask, note


def _write(mask: LayerMask, out: Path, inputs: Inputs, config: SearchConfig) -> None:
    """Write the mask and its picture, then keep the logs and remove the checkpoints."""
    title = f"{Path(inputs.model).name} on {Path(inputs.data).stem}: method {config.method}"
    if can_draw():
        heatmap(mask, out / "heatmap.png", title=title)
    mask.save(out / "mask.json")
    for stage in ("stage1", "stage2"):
        keep_logs(out / stage, out / LOGS / stage)
    for folder in ("stage1", "stage2", WeightUpdates.folder):
        shutil.rmtree(out / folder, ignore_errors=True)


def _finished(out: Path, config: SearchConfig, full: bool) -> LayerMask | None:
    """Return the mask in a folder if this search made it; ``learn_mask`` refuses any other."""
    if not (out / "mask.json").is_file():
        return None
    mask = LayerMask.load(out)
    _check_finished(mask, out)
    said = Provenance(mask.provenance)
    mine = json.loads(json.dumps(config.as_dict()))
    return mask if thawed(said.config) == mine and said.full == full else None


def _held_out_loss(model: nn.Module, prepared: Prepared, config: SearchConfig) -> float | None:
    if not prepared.held_out:
        return None
    return held_out_loss(model, prepared.held_out, prepared.collator, config.batch_size)


_HELD_OUT = dict.fromkeys(("before", "after_stage1"), or_null(NUMBER))
_STAGE1 = {
    **dict.fromkeys(("first_window_loss", "last_window_loss"), NUMBER),
    **{"steps": COUNT, "loss_window": COUNT, "stopped": TEXT},
}


def _check_finished(mask: LayerMask, out: Path) -> None:
    """Refuse a mask without the record of the search that learned it."""
    where = f"{out / 'mask.json'}, provenance"
    check_record(mask.provenance, {"search": OBJECT, "held_out_loss": OBJECT}, where)
    check_record(mask.provenance["held_out_loss"], _HELD_OUT, f"{where}.held_out_loss")
    search = mask.provenance["search"]
    parts = dict.fromkeys(("config", "stage1", "stage2", "spread"), OBJECT)
    check_record(search, parts, f"{where}.search")
    check_record(search["config"], {"method": TEXT}, f"{where}.search.config")
    check_record(search["stage1"], {"steps": COUNT}, f"{where}.search.stage1")
    if search["stage1"]["steps"]:
        check_record(search["stage1"], _STAGE1, f"{where}.search.stage1")
    check_record(search["stage2"], {"steps": COUNT}, f"{where}.search.stage2")
    spread = dict.fromkeys(("min", "max", "std"), NUMBER)
    check_record(search["spread"], spread, f"{where}.search.spread")

"""What ``ila learn`` does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from ila.commands.inputs import Inputs, check_folder, claim_folder, prepare, refuse_packed
from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.models.open_weights import OpenLayers, open_layers
from ila.reports.figures import heatmap
from ila.runs.checkpoints import LOGS, keep_logs
from ila.runs.processes import owning, processes
from ila.runs.records import COUNT, NUMBER, OBJECT, TEXT, check_record, or_null
from ila.search.learn import SearchConfig, learn_mask
from ila.search.weight_updates import WeightUpdates
from ila.training.loop import held_out_loss


def learn(
    inputs: Inputs,
    config: SearchConfig,
    out: Path,
    *,
    full: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> tuple[LayerMask, str]:
    """Learn a mask into ``out``: ``mask.json``, ``heatmap.png``, ``log.jsonl``, ``adapter/``.

    With ``full`` the layers' own weights are trained and their changes scored; no adapter is kept.

    Returns:
        The mask and what became of the rows, in words.
    """
    config, inputs = replace(config, seed=inputs.seed), inputs.located()
    check_folder(out, inputs, resume, "learn")
    refuse_packed(full, inputs)
    with owning(out):
        return _learn_owned(inputs, config, out, full, resume, progress)


def _learn_owned(
    inputs: Inputs, config: SearchConfig, out: Path, full: bool, resume: bool, progress: bool
) -> tuple[LayerMask, str]:
    check_folder(out, inputs, resume, "learn")  # again: it may have had an owner until now
    prepared = prepare(inputs, progress=progress)
    model = open_layers(prepared.model) if full else prepared.model
    description = {**prepared.description, "full": True} if full else prepared.description
    claim_folder(out, description, resume, "learn")
    if resume and (out / "mask.json").is_file():
        mask = LayerMask.load(out)
        _check_finished(mask, out)
        search = mask.provenance["search"]
        same = thawed(search["config"]) == json.loads(json.dumps(config.as_dict()))
        if same and mask.provenance.get("full", False) == full:
            return mask, prepared.note  # finished; with another config, learn_mask objects
    size, collator = config.batch_size, prepared.collator
    held_out = prepared.held_out
    bare = model.model if isinstance(model, OpenLayers) else model
    before = held_out_loss(bare, held_out, collator, size) if held_out else None
    mask = learn_mask(
        model,
        prepared.dataset,
        config,
        collator=collator,
        output_dir=out,
        resume=resume,
        progress=progress,
    )
    after = held_out_loss(bare, held_out, collator, size) if held_out else None
    held = {"before": before, "after_stage1": after, "rows": len(held_out)}
    provenance = {**description, "search": mask.provenance, "held_out_loss": held}
    mask = LayerMask(mask.scores, provenance=provenance)
    if processes().is_main_process:
        title = f"{Path(inputs.model).name} on {Path(inputs.data).stem}: method {config.method}"
        heatmap(mask, out / "heatmap.png", title=title)
        mask.save(out / "mask.json")
        for stage in ("stage1", "stage2"):
            keep_logs(out / stage, out / LOGS / stage)
        for folder in ("stage1", "stage2", WeightUpdates.folder):
            shutil.rmtree(out / folder, ignore_errors=True)
    return mask, prepared.note


_HELD_OUT = dict.fromkeys(("before", "after_stage1"), or_null(NUMBER))
_STAGE1 = {
    **dict.fromkeys(("first_window_loss", "last_window_loss"), NUMBER),
    **{"steps": COUNT, "loss_window": COUNT, "stopped": TEXT},
}


def _check_finished(mask: LayerMask, out: Path) -> None:
    """Refuse a mask that does not say how it was learned."""
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

"""``ila train --select-at``: search, selection and training as one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ila.commands.inputs import Inputs, check_folder, claim_folder, prepare
from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.reports.figures import can_draw, heatmap
from ila.runs.metrics import Metrics
from ila.runs.processes import on_main_process, owning
from ila.search.one_run import MASK, train_and_select
from ila.search.selection import Selection
from ila.training.batches import padding_of
from ila.training.config import TrainConfig
from ila.training.train import check_training


def train_once(
    inputs: Inputs,
    config: TrainConfig,
    selection: Selection,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    written: Mapping[str, object] | None = None,
) -> tuple[Metrics, str]:
    """Train all layers into ``out``, select, continue with the selected ones.

    ``out`` gets the files of ``ila learn``, ``ila select`` and ``ila train``: ``mask.json`` (scores
    and open layers), ``heatmap.png``, ``log.jsonl``, ``metrics.json`` and a plain PEFT adapter.
    ``written`` are the options to write as ``config.yaml``.

    Returns:
        The metrics, and a note on the rows.
    """
    config, inputs = replace(config, seed=inputs.seed), inputs.located()
    check_folder(out, inputs, resume, "train")
    with owning(out):
        if config.steps is not None:
            selection.step(config.steps)  # raises before a large model loads
        prepared = prepare(inputs, progress=progress)
        padding = padding_of(prepared.dataset, config)
        none = dict.fromkeys(("open", "closed", "from"))
        description = {**prepared.description, **none, "full": False}
        description["selection"] = selection.as_dict()
        check_training(config, prepared.model, prepared.dataset, prepared.held_out)
        claim_folder(out, description, resume, "train", written)
        metrics, mask = train_and_select(
            prepared.model,
            prepared.dataset,
            config,
            selection,
            held_out=prepared.held_out,
            collator=prepared.collator,
            output_dir=out,
            resume=resume,
            progress=progress,
            name=out.name,
            tokenizer=prepared.tokenizer,
        )
        on_main_process(lambda: _describe(mask, description, config, inputs, out))
        return metrics, f"{prepared.note}\n{padding}"


def _describe(
    mask: LayerMask, description: dict[str, object], config: TrainConfig, inputs: Inputs, out: Path
) -> None:
    """Write the mask with the provenance of a mask of ``ila learn``, and its heat map."""
    provenance = thawed(mask.provenance)
    search = provenance["search"]["config"]
    search["batch_size"] = config.batch_size
    described = {**description, **provenance}
    LayerMask(mask.scores, mask.gates, described).save(out / MASK)
    title = f"{Path(inputs.model).name} on {Path(inputs.data).stem}: method {search['method']}"
    if can_draw():
        heatmap(mask, out / "heatmap.png", title=title)

"""What the commands do, as functions: ``ila.cli`` only reads options and prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ila.commands.inputs import Inputs, adapt, check_folder, claim_folder, prepare, read_run
from ila.masks.mask import LayerMask, thawed
from ila.models.edit import apply_mask
from ila.models.explain import Explanation, explain
from ila.models.loading import find_source, load_model, load_tokenizer
from ila.models.open_weights import CHANGED_FILE, OpenLayers, load_changed, open_layers
from ila.reports.figures import heatmap, runs_figure
from ila.reports.tables import runs_markdown
from ila.runs.atomic import write_folder_atomic, write_json_atomic, write_text_atomic
from ila.runs.metrics import load_run
from ila.runs.processes import processes
from ila.search.learn import SearchConfig, learn_mask
from ila.search.weight_updates import FullUpdates
from ila.training.loop import held_out_loss
from ila.training.train import ADAPTER_FILES, TrainConfig, train

_REPORT_MARK = "<!-- written by `ila report`, which may write it again -->"


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
    _refuse_packed(full, inputs)
    prepared = prepare(inputs, progress=progress)
    model = open_layers(prepared.model) if full else prepared.model
    description = {**prepared.description, "full": True} if full else prepared.description
    claim_folder(out, description, resume, "learn")
    if resume and (out / "mask.json").is_file():
        mask = LayerMask.load(out)
        same = thawed(mask.provenance["search"]["config"]) == json.loads(
            json.dumps(config.as_dict())
        )
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
        for folder in ("stage1", "stage2", FullUpdates.folder):
            shutil.rmtree(out / folder, ignore_errors=True)
    return mask, prepared.note


def train_selected(
    inputs: Inputs,
    config: TrainConfig,
    out: Path,
    *,
    mask_file: Path | None = None,
    full: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> tuple[dict[str, Any], str]:
    """Train the layers a mask opens (all without one) into ``out``.

    The result is a plain PEFT adapter; with ``full``, the changed weights of the layers themselves
    in ``changed.safetensors``.

    Returns:
        The metrics and what became of the rows, in words.

    Raises:
        ValueError: If the mask was learned on a model of another configuration. Names of layers
            are no proof: Llama-2-7B and Mistral-7B share all of theirs. A chat model has the
            configuration of its base, so a mask goes from one to the other.
    """
    config, inputs = replace(config, seed=inputs.seed), inputs.located()
    check_folder(out, inputs, resume, "train")
    mask = None if mask_file is None else LayerMask.load(mask_file)
    _refuse_packed(full, inputs)
    prepared = prepare(inputs, progress=progress)
    if mask is not None:
        _check_same_model(mask, mask_file, prepared.description["model"])
    model: PeftModel | OpenLayers = prepared.model
    if full:
        model = open_layers(prepared.model, mask)
    elif mask is not None:
        apply_mask(prepared.model, mask)
    opened = None if mask is None else list(mask.open)
    description = {**prepared.description, "open": opened, "full": full}
    claim_folder(out, description, resume, "train")
    metrics = train(
        model,
        prepared.dataset,
        config,
        held_out=prepared.held_out,
        collator=prepared.collator,
        output_dir=out,
        resume=resume,
        progress=progress,
        name=out.name,
    )
    return metrics, prepared.note


def _refuse_packed(full: bool, inputs: Inputs) -> None:
    if full and inputs.load_in is not None:
        raise ValueError("full training changes the base's own weights; leave out load_in")


def _check_same_model(mask: LayerMask, file: Path | None, model: dict[str, Any]) -> None:
    """Compare the configurations' fingerprints; a mask that says nothing of its model passes."""
    learned_on = mask.provenance.get("model")
    fingerprint = isinstance(learned_on, Mapping) and learned_on.get("config_fingerprint")
    if fingerprint and fingerprint != model["config_fingerprint"]:
        raise ValueError(
            f"mask {file} was learned on model {learned_on.get('source')!r} "
            f"({learned_on.get('architecture')}), and the configuration of model "
            f"{model['source']!r} ({model['architecture']}) is another; learn a mask on it. "
            "ila.apply_mask, in Python, asks for the same layer names only"
        )


def explain_layers(inputs: Inputs, tokens: int, *, mask_file: Path | None = None) -> Explanation:
    """Say which layers of a model a mask opens, what computes them, and what they keep.

    Of ``inputs`` only what makes the model and its adapter is read, no data.
    """
    mask = None if mask_file is None else LayerMask.load(mask_file)
    source = find_source(inputs.model, inputs.gguf_file, inputs.trust_remote_code)
    model = load_model(source, inputs.dtype, inputs.load_in, processes().device)
    model = adapt(model, inputs)
    if mask is not None:
        apply_mask(model, mask)
    return explain(model, tokens)


def report(runs: list[Path], out: Path) -> list[dict[str, Any]]:
    """Compare finished trainings: ``report.md`` and ``report.png`` in ``out``.

    A report that is there is written again, so that one can be kept up to date.

    Raises:
        FileExistsError: If a file of one of these names is there that no report made.
    """
    loaded = [load_run(run) for run in runs]
    page, picture = out / "report.md", out / "report.png"
    ours = page.is_file() and page.read_text("utf-8", "replace").startswith(_REPORT_MARK)
    for file in (page, picture):
        if file.exists() and not ours:
            raise FileExistsError(f"{file} is not of `ila report` and was left alone; move it")
    out.mkdir(parents=True, exist_ok=True)
    # The page first: without its mark the picture could not be written again.
    write_text_atomic(
        page, f"{_REPORT_MARK}\n\n{runs_markdown(loaded)}\n\n![report]({picture.name})\n"
    )
    runs_figure(loaded, picture)
    return loaded


def export(run: Path, out: Path, *, merge: bool = False) -> str:
    """Write a trained adapter, or changed weights, elsewhere: alone or in their base model.

    An adapter trained over a packed base is merged into the dense one: packing again would round
    it away, and the result is a model like any other.

    Returns:
        What was written, in words.

    Raises:
        FileNotFoundError: If ``run`` holds no finished adapter or changed weights.
        FileExistsError: If ``out`` exists.
        ValueError: If the weights are damaged.
    """
    found = read_run(run, "train")
    full = found.get("full", False)
    files = (CHANGED_FILE, "run.json") if full else ADAPTER_FILES
    missing = [name for name in files if not (run / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{run} has no {' and no '.join(missing)}: is it finished?")
    if out.exists():
        raise FileExistsError(f"{out} exists and was left alone; give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not merge:
        with write_folder_atomic(out) as folder:
            for name in files:
                shutil.copyfile(run / name, folder / name)
        return "Changed weights" if full else "Adapter"
    inputs = found["inputs"]
    source = find_source(inputs["model"], inputs["gguf_file"], inputs["trust_remote_code"])
    with write_folder_atomic(out) as folder:
        model = load_model(source, inputs["dtype"])
        if full:
            load_changed(model, run)
        else:
            model = _merged(model, run)
        model.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
        note = {"base": found["model"], "merged": True}
        packed = inputs.get("load_in")
        if packed:
            note["trained_over"] = packed
        write_json_atomic(folder / "ila-export.json", note)
    if full:
        return "Model with the changed weights"
    return f"Merged model (dense; trained over {packed})" if packed else "Merged model"


def _merged(model: PreTrainedModel, run: Path) -> PreTrainedModel:
    try:
        adapted = PeftModel.from_pretrained(model, str(run))
    except SafetensorError as error:
        raise ValueError(f"the adapter in {run} is damaged: {error}") from error
    return adapted.merge_and_unload(safe_merge=True)

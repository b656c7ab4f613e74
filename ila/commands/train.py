"""What ``ila train`` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from ila.commands.inputs import Inputs, check_folder, claim_folder, prepare, refuse_packed
from ila.masks.mask import LayerMask
from ila.models.edit import apply_mask
from ila.models.loading import same_layers
from ila.models.open_weights import OpenLayers, open_layers
from ila.runs.processes import owning
from ila.training.batches import padding_note
from ila.training.config import TrainConfig
from ila.training.train import train


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
        ValueError: If the mask was learned on a model whose layers have other sizes. Names of
            layers are no proof: Llama-2-7B and Mistral-7B share all of theirs. A chat model has
            the layers of its base, so a mask goes from one to the other.
    """
    config, inputs = replace(config, seed=inputs.seed), inputs.located()
    check_folder(out, inputs, resume, "train")
    with owning(out):
        return _train_owned(inputs, config, out, mask_file, full, resume, progress)


def _train_owned(
    inputs: Inputs,
    config: TrainConfig,
    out: Path,
    mask_file: Path | None,
    full: bool,
    resume: bool,
    progress: bool,
) -> tuple[dict[str, Any], str]:
    check_folder(out, inputs, resume, "train")  # again: it may have had an owner until now
    mask = None if mask_file is None else LayerMask.load(mask_file)
    refuse_packed(full, inputs)
    prepared = prepare(inputs, progress=progress)
    padding = padding_note(prepared.dataset, config.batch_size, config.training_args)
    note = f"{prepared.note}\n{padding}"
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
        tokenizer=None if full else prepared.tokenizer,
    )
    return metrics, note


def _check_same_model(mask: LayerMask, file: Path | None, model: dict[str, Any]) -> None:
    """Compare names and sizes of the layers; a mask that says nothing of its model passes."""
    learned_on = mask.provenance.get("model")
    if isinstance(learned_on, Mapping) and not same_layers(learned_on, model):
        raise ValueError(
            f"mask {file} was learned on model {learned_on.get('source')!r} "
            f"({learned_on.get('architecture')}), and the layers of model "
            f"{model['source']!r} ({model['architecture']}) have other names or sizes; learn a "
            "mask on it. ila.apply_mask, in Python, asks for the same layer names only"
        )

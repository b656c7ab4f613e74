"""``ila train``: train the layers that a mask opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from peft import PeftConfig, PeftModel

from ila.commands.inputs import (
    Inputs,
    Prepared,
    check_folder,
    claim_folder,
    prepare,
    refuse_packed,
)
from ila.masks.mask import LayerMask
from ila.masks.provenance import Provenance
from ila.models.adalora import set_total_step
from ila.models.base_starts import start_from_base, takes_base
from ila.models.edit import apply_mask
from ila.models.loading import same_layers
from ila.models.open_weights import OpenLayers, open_layers
from ila.runs.metrics import Metrics
from ila.runs.processes import owning, processes
from ila.training.adapter import load_adapter
from ila.training.batches import padding_of
from ila.training.config import TrainConfig
from ila.training.train import check_training, train


def train_selected(
    inputs: Inputs,
    config: TrainConfig,
    out: Path,
    *,
    mask_file: Path | None = None,
    closed: str = "drop",
    start: Path | None = None,
    full: bool = False,
    resume: bool = False,
    progress: bool = True,
    written: Mapping[str, object] | None = None,
) -> tuple[Metrics, str]:
    """Train the layers that a mask opens, or all layers without a mask, into ``out``.

    The result is a plain PEFT adapter; with ``full``, the changed weights of the layers in
    ``changed.safetensors``.

    Args:
        inputs: Options of the input.
        config: Options of the training.
        out: Folder of the run.
        mask_file: Mask with the open layers.
        closed: Way to close the others: ``"drop"`` or ``"keep"``.
        start: Adapter to start from, such as the adapter of a search.
        full: Whether to train the layers' own weights.
        resume: Whether to continue the run in ``out``.
        progress: Whether to show progress bars.
        written: Options to write as ``config.yaml``.

    Returns:
        The metrics, and a note on the rows.

    Raises:
        ValueError: If the mask was learned on a model whose layers have other sizes. Names of
            layers prove nothing: Llama-2-7B and Mistral-7B have the same names. A chat model has
            the layers of its base, so a mask fits both. If the adapter to go on from has another
            rank, alpha or layers.
    """
    config, inputs = replace(config, seed=inputs.seed), inputs.located()
    check_folder(out, inputs, resume, "train")
    with owning(out):
        layers = _Layers(mask_file, closed, start, full, inputs.init_lora_weights)
        return _train_owned(inputs, config, out, layers, resume, progress, written)


class _Layers(NamedTuple):
    """The layers to train: mask, way to close the others, first adapter, own weights, start."""

    mask_file: Path | None
    closed: str
    start: Path | None
    full: bool
    init: str | None


def _train_owned(
    inputs: Inputs,
    config: TrainConfig,
    out: Path,
    layers: _Layers,
    resume: bool,
    progress: bool,
    written: Mapping[str, object] | None,
) -> tuple[Metrics, str]:
    mask_file, closed, start, full, _ = layers
    refuse_packed(full, inputs)
    check_folder(out, inputs, resume, "train")  # again: it may have had an owner until now
    mask = None if mask_file is None else LayerMask.load(mask_file)
    prepared = prepare(inputs, progress=progress)
    if mask is not None:
        _check_same_model(mask, mask_file, prepared.description["model"])
    model = _opened(prepared, config, layers, mask)
    description = {
        **prepared.description,
        "open": None if mask is None else list(mask.open),
        "full": full,
        "selection": None,
        "closed": None if closed == "drop" else closed,
        "from": None if start is None else str(start.absolute()),
    }
    check_training(config, model.model if full else model, prepared.dataset, prepared.held_out)
    claim_folder(out, description, resume, "train", written)
    padding = padding_of(prepared.dataset, config)
    return train(
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
    ), f"{prepared.note}\n{padding}"


def _opened(
    prepared: Prepared, config: TrainConfig, layers: _Layers, mask: LayerMask | None
) -> PeftModel | OpenLayers:
    """Load the first adapter and apply the mask, or open the layers' own weights."""
    model = prepared.model
    steps = config.for_rows(len(prepared.dataset), processes().num_processes).steps
    set_total_step(model, steps)
    if layers.start is not None:
        _check_alpha(layers.start, model.peft_config["default"])
        load_adapter(model, "default", layers.start)
    if layers.full:
        return open_layers(model, mask)
    if mask is not None:
        apply_mask(model, mask, closed=layers.closed)
    if takes_base(layers.init):
        start_from_base(model, layers.init)
    return model


def _check_alpha(start: Path, own: PeftConfig) -> None:
    """Raise unless an adapter has the scaling of this run; its tensors do not tell."""
    config = PeftConfig.from_pretrained(str(start))
    theirs, mine = (config.r, config.lora_alpha), (own.r, own.lora_alpha)
    if theirs != mine:
        raise ValueError(
            f"the adapter in {start} has rank and alpha {theirs}, and this run {mine}; give --rank "
            "and --alpha of the search"
        )


def _check_same_model(mask: LayerMask, file: Path | None, model: dict[str, object]) -> None:
    """Compare names and sizes of the layers; a mask without a model passes."""
    said = Provenance(mask.provenance)
    if said.model_record and not same_layers(said.model_record, model):
        raise ValueError(
            f"mask {file} was learned on model {said.model_source!r} "
            f"({said.architecture}), and the layers of model "
            f"{model['source']!r} ({model['architecture']}) have other names or sizes; learn a "
            "mask on it. ila.apply_mask, in Python, asks for the same layer names only"
        )

"""Learn a mask: ``learn_mask`` trains LoRA until it settles, then scores every layer.

Stage 1 is ordinary LoRA training until the loss is ε-stable or the steps are spent. Stage 2 freezes
all weights, gives each layer a gate γ = σ(s), and turns gates into scores by one of ``METHODS``.
Source: Shi et al., "Understanding Layer Significance in LLM Alignment", arXiv 2410.17875.

Use the parts, ``begin``, ``run_stage1``, ``score`` and ``mask_of``, to score one stage 1 by several
methods.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from ila.data.contracts import Collate, Dataset
from ila.masks.mask import LayerMask, spread_of
from ila.masks.rules import bare
from ila.models.adalora import tuner_of
from ila.models.open_weights import OpenLayers
from ila.models.tensors import MaskedTensor, record_of_tensors
from ila.runs.processes import on_main_process, owning
from ila.search.adapter_updates import AdapterUpdates
from ila.search.baselines import FORWARD, POSITIONS, UNTRAINED
from ila.search.config import METHODS, SEARCHES, SearchConfig
from ila.search.methods import Scored, parameters, score
from ila.search.stage import Search, Updates
from ila.search.stage1 import Stage1, check_search, run_stage1
from ila.search.weight_updates import WeightUpdates
from ila.training.loop import check_dataset, default_collator

__all__ = ["METHODS", "SearchConfig", "begin", "learn_mask", "mask_of", "run_stage1", "score"]


def learn_mask(
    peft_model: PeftModel | OpenLayers,
    dataset: Dataset,
    config: SearchConfig | None = None,
    *,
    collator: Collate | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    held_out: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> LayerMask:
    """Learn how much each LoRA layer of a model, or each layer trained in full, matters.

    Afterwards the model holds the adapter (or the weights) of stage 1, all layers open, no gates.

    Args:
        peft_model: Model of ``ila.attach`` or ``ila.convert``, one active adapter, every layer
            open. Or the result of ``ila.models.open_weights.open_layers`` without a mask: stage 1
            then trains the layers' own weights, and gates scale ΔW = W − W₀ of each.
        dataset: Rows with ``input_ids`` and ``labels`` (-100 on tokens without loss), for example
            of ``ila.data.encode``.
        config: Options of the search; ``None`` takes the defaults.
        collator: Turns rows into a batch; ``None`` pads on the right with the model's pad id.
        output_dir: Folder for checkpoints, ``adapter/`` (stage 1; ``changed/`` with float32 weights
            if the layers' own weights train) and ``log.jsonl``; ``None`` keeps no files.
        resume: Continue the search that ``output_dir`` holds.
        progress: Whether to show progress bars on stderr.
        held_out: Rows for the evaluations that ``config.eval_every`` asks for.
        callbacks: Callbacks for ``transformers.Trainer`` in stage 1.

    Returns:
        A mask with all layers open and their scores. Its ``provenance`` holds the configuration,
        the course of both stages, the free signal of stage 1, the cost of the scores in steps and
        seconds, the parameters of each layer (a large layer may win by its size alone), and the
        scores of eighths of the batches, which tell how well a ranking repeats.

    Raises:
        ValueError: If the model has no layer to score, a layer is closed or does not take the
            fused path, the data set is empty, or ``output_dir`` holds another search.
        FloatingPointError: If the loss stops being finite.
    """
    if output_dir is None and resume:
        raise ValueError("resume=True needs the output_dir of the search to go on with")
    kept = None if output_dir is None else Path(output_dir)
    with (
        owning(kept),
        tempfile.TemporaryDirectory() if kept is None else nullcontext(kept) as folder,
    ):
        search = begin(
            peft_model,
            dataset,
            SearchConfig() if config is None else config,
            collator=collator,
            folder=Path(folder),
            keep=output_dir is not None,
            resume=resume,
            progress=progress,
            held_out=held_out,
            callbacks=callbacks,
        )
        check_search(search.config, search.updates.model, dataset, held_out)
        on_main_process(search.claim)
        training = search.updates.model.training
        try:
            stage1 = run_stage1(search)
            return mask_of(search, stage1, score(search, stage1))
        finally:
            search.updates.model.train(training)


def begin(
    peft_model: PeftModel | OpenLayers,
    dataset: Dataset,
    config: SearchConfig,
    *,
    collator: Collate | None = None,
    **more: Any,
) -> Search:
    """Check the arguments of a search; they and the errors are as in ``learn_mask``.

    Args:
        peft_model: Model to search.
        dataset: Rows.
        config: Options of the search.
        collator: Turns rows into a batch.
        **more: Further fields of ``Search``.
    """
    full = isinstance(peft_model, OpenLayers)
    updates: Updates = WeightUpdates(peft_model) if full else AdapterUpdates(peft_model)
    _check_method(config.method, updates)
    check_dataset(dataset)
    collator = default_collator(updates.model) if collator is None else collator
    return Search(updates, dataset, collator, config, **more)


def _check_method(method: str, updates: Updates) -> None:
    """Raise unless a method can score these updates."""
    full = isinstance(updates, WeightUpdates)
    if full and method in set(METHODS) - {*SEARCHES, *POSITIONS}:
        raise ValueError(
            f"method must be one of {(*SEARCHES, *POSITIONS)} where weights are trained in full, "
            f"got {method!r}"
        )
    if method in UNTRAINED and method not in POSITIONS and tuner_of(updates.model):
        raise ValueError(
            f"method must not be {method!r} for AdaLoRA, whose E begins at 0; use 'path'"
        )
    tensors = [name for name, each in updates.layers.items() if isinstance(each, MaskedTensor)]
    if method in FORWARD and tensors:
        raise ValueError(
            f"method must not be {method!r} where experts have adapters: it reads x and y of a "
            f"linear layer, and {bare(tensors[0])} is a tensor that PEFT adapts; use 'path'"
        )


def mask_of(search: Search, stage1: Stage1, scored: Scored) -> LayerMask:
    """Make a mask of the scores, with all layers open and the record of the search."""
    course = {k: v for k, v in stage1.items() if k not in ("gate_gradient", "folds", "seconds")}
    provenance = {
        "config": search.config.as_dict(),
        "stage1": course,
        "stage2": {"steps": scored.steps},
        "signals": {"gate_gradient": stage1["gate_gradient"]},
        "cost": {
            "stage1": {"steps": stage1["steps"], "seconds": stage1["seconds"]},
            "scores": {"steps": scored.steps, "seconds": scored.seconds},
        },
        "parameters": parameters(search.updates),
        "folds": [list(fold) for fold in scored.folds],
        "spread": spread_of(scored.scores),
        **record_of_tensors(search.updates.layers),
    }
    return LayerMask(scored.scores, provenance=provenance)

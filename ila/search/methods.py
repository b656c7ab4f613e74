"""Score every layer after stage 1: ``score`` runs the method of the search.

``ila.search.config`` lists the methods; ``ila.search.baselines`` has the formulas of cheap ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from ila.models.layer import MaskedLoraLayer
from ila.models.lean_head import leaning
from ila.runs.processes import on_main_process, sum_over_processes
from ila.runs.progress import bar
from ila.search import stage2
from ila.search.baselines import (
    FORWARD,
    POSITIONS,
    GradientNorm,
    TokenMean,
    by_position,
    refuse_sharded,
    update_norms,
)
from ila.search.gate_gradients import FOLDS, LayerMean, PathGradient, SignalTrainer
from ila.search.spectra import SPECTRA, by_weights
from ila.search.stage import EndedStage, Search, Updates, make_trainer, train_stage
from ila.search.stage1 import Stage1


@dataclass(frozen=True)
class Scored:
    """Scores of all layers, and their cost beside stage 1.

    Attributes:
        scores: Module name -> importance.
        steps: Batches that the method read.
        seconds: Wall time of these batches, on the main process.
        folds: Scores of disjoint parts of the batches, in the order of the layers; empty where
            scores are not a mean over batches.
    """

    scores: dict[str, float]
    steps: int = 0
    seconds: float = 0.0
    folds: Sequence[Sequence[float]] = field(default_factory=list)


def score(search: Search, stage1: Stage1) -> Scored:
    """Score every layer by ``search.config.method``.

    Args:
        search: Search after stage 1.
        stage1: Result of stage 1.
    """
    method, updates = search.config.method, search.updates
    if method == "gate_gradient":
        return Scored(dict(stage1["gate_gradient"]), folds=stage1["folds"])
    if method in POSITIONS:
        return Scored(by_position(list(updates.layers), method, search.config.seed))
    if method == "update_norm" or method in SPECTRA:
        return _norms_of_weights(search)
    if method == "gradient_norm":
        norms = GradientNorm(updates.layers, updates.adapter)
        done = _train_scores(search, SignalTrainer, signal=norms, learning_rate=0.0)
        return _averaged(norms, done)
    if method in FORWARD:
        return _forward_scores(search)
    with updates.scored(search.config.score_init):
        return _path_scores(search) if method == "path" else _trained_scores(search)


def parameters(updates: Updates) -> dict[str, int]:
    """Return module name -> trained parameters; R (K + N) for LoRA."""
    counts = {}
    for name, layer in updates.layers.items():
        adapted = isinstance(layer, MaskedLoraLayer)
        own = layer.adapter_parameters(updates.adapter) if adapted else layer.parameters(False)
        counts[name] = sum(p.numel() for p in own)
    return counts


def _norms_of_weights(search: Search) -> Scored:
    """Score by weights alone: the adapter's, or the singular values of the base's."""
    began, updates, method = time.perf_counter(), search.updates, search.config.method
    refuse_sharded(updates.layers)
    if method == "update_norm":
        norms = update_norms(updates.layers, updates.adapter)
    else:
        norms = by_weights(updates.layers, method, progress=search.progress)
    return Scored(norms, seconds=on_main_process(lambda: time.perf_counter() - began))


def _forward_scores(search: Search) -> Scored:
    """Run batches forward only, in Trainer's order; this is too short to keep checkpoints."""
    settings = _stage2_settings(search)
    trainer = make_trainer(search, SignalTrainer, **settings, learning_rate=0.0).trainer
    seen = TokenMean(search.updates.layers, search.updates.adapter, search.config.method)
    steps = search.config.stage2_steps
    loader = trainer.get_train_dataloader()
    model = trainer.model.eval()
    batches = islice(chain.from_iterable(repeat(loader)), steps)
    shown = bar(batches, f"Stage 2: {search.config.method}", total=steps, show=search.progress)
    began = time.perf_counter()
    with torch.no_grad(), seen.listening(), leaning(model), trainer.accelerator.autocast():
        for step, batch in enumerate(shown):
            everything = torch.ones_like(batch["labels"])
            seen.begin(batch.get("attention_mask", everything), step)
            model(**batch)
    totals, tokens = _summed(seen)
    seconds = on_main_process(lambda: time.perf_counter() - began)
    means = (totals.sum(0) / tokens.sum()).tolist()
    scores = dict(zip(seen.layers, means, strict=True))
    read = tokens > 0
    folds = (totals[read] / tokens[read, None]).tolist()
    return Scored(scores, steps, seconds, folds)


def _summed(seen: TokenMean) -> tuple[Tensor, Tensor]:
    """Add totals (folds, layers) and tokens (folds,) up over all processes, in one collective."""
    table = torch.cat([seen.totals, seen.tokens[:, None]], 1)
    sums = sum_over_processes(table.flatten().tolist())
    summed = torch.tensor(sums, dtype=torch.float64).view(FOLDS, -1)
    return summed[:, :-1], summed[:, -1]


def _averaged(signal: LayerMean, done: EndedStage) -> Scored:
    return Scored(signal.mean(), done.steps, done.seconds, signal.folds())


def _path_scores(search: Search) -> Scored:
    path = PathGradient(search.updates.layers, search.updates.adapter, stage2.PATH_POINTS)
    # ``PathGradient`` sets the gates, so the optimiser must not move them. Not SGD: a checkpoint of
    # FSDP cannot restore an optimiser without state.
    done = _train_scores(
        search, stage2.ScoreTrainer, signal=path, optim="adamw_torch", learning_rate=0.0
    )
    return _averaged(path, done)


def _trained_scores(search: Search) -> Scored:
    spread = stage2.LogSpread(search.updates.layers, search.updates.adapter, search.log("stage2"))
    rate = search.config.score_learning_rate
    done = _train_scores(search, stage2.ScoreTrainer, callbacks=[spread], learning_rate=rate)
    scores = stage2.read_scores(search.updates.layers, search.updates.adapter)
    return Scored(_unmoved_last(scores, search.config.score_init), done.steps, done.seconds)


def _unmoved_last(scores: Mapping[str, float], start: float) -> dict[str, float]:
    """Rank a layer last whose score never moved from the start: the model never calls it."""
    start = torch.tensor(start).item()  # as the parameter holds it
    moved = [score for score in scores.values() if score != start]
    lowest = min(moved, default=start)
    return {name: lowest if score == start else score for name, score in scores.items()}


def _train_scores(
    search: Search, trainer_class: type[SignalTrainer], **settings: Any
) -> EndedStage:
    return train_stage(search, trainer_class, **(_stage2_settings(search) | settings))


def _stage2_settings(search: Search) -> dict[str, Any]:
    return {
        "stage": "stage2",
        "keep_settings": True,  # others would change the scores
        "title": f"Stage 2: {search.config.method}",
        "steps": search.config.stage2_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1e30,  # clips nothing
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": None,
        "optim": TrainingArguments.__dataclass_fields__["optim"].default,
        "optim_args": None,
        "eval_on_start": False,
    }

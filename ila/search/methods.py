"""From what stage 1 left to a score for every layer: the methods behind one interface, ``score``.

``search_config`` lists them, ``baselines`` has the formulas of the cheap ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ila.runs.processes import on_main_process, sum_over_processes
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
from ila.search.stage import EndedStage, Search, Updates, make_trainer, train_stage


@dataclass(frozen=True)
class Scored:
    """Scores of all layers, and what they cost beside stage 1.

    Attributes:
        scores: Module name -> importance.
        steps: Batches that were looked at.
        seconds: Wall time of that, on the main process.
        folds: The scores that disjoint parts of the batches give, in the order of the layers; none
            where scores are no mean over batches.
    """

    scores: dict[str, float]
    steps: int = 0
    seconds: float = 0.0
    folds: Sequence[Sequence[float]] = field(default_factory=list)


def score(search: Search, stage1: Mapping[str, Any]) -> Scored:
    """Score every layer by ``search.config.method``.

    Args:
        search: The search, its model as stage 1 left it.
        stage1: What stage 1 gathered: ``gate_gradient`` and ``folds``.
    """
    method, updates = search.config.method, search.updates
    if method == "gate_gradient":
        return Scored(dict(stage1["gate_gradient"]), folds=stage1["folds"])
    if method in POSITIONS:
        return Scored(by_position(list(updates.layers), method, search.config.seed))
    if method == "update_norm":
        return _update_norms(search)
    if method == "gradient_norm":
        norms = GradientNorm(updates.layers, updates.adapter)
        done = _train_scores(search, SignalTrainer, signal=norms, learning_rate=0.0)
        return _averaged(norms, done)
    if method in FORWARD:
        return _forward_scores(search)
    with updates.scored(search.config.score_init):
        return _path_scores(search) if method == "path" else _trained_scores(search)


def parameters(updates: Updates) -> dict[str, int]:
    """Return module name -> parameters that training it trains; R (K + N) for an adapter."""
    counts = {}
    for name, layer in updates.layers.items():
        parts = [layer]
        if hasattr(layer, "lora_A"):
            parts = [layer.lora_A[updates.adapter], layer.lora_B[updates.adapter]]
        counts[name] = sum(p.numel() for part in parts for p in part.parameters(recurse=False))
    return counts


def _update_norms(search: Search) -> Scored:
    began = time.perf_counter()
    refuse_sharded(search.updates.layers)
    norms = update_norms(search.updates.layers, search.updates.adapter)
    return Scored(norms, seconds=on_main_process(lambda: time.perf_counter() - began))


def _forward_scores(search: Search) -> Scored:
    """Batches forward alone, the order and placement Trainer's; too short to keep checkpoints."""
    settings = _stage2_settings(search) | {"learning_rate": 0.0}
    trainer, _, _ = make_trainer(search, SignalTrainer, **settings)
    seen, steps = TokenMean(search.updates.layers, search.updates.adapter, search.config.method), 0
    loader = trainer.get_train_dataloader()
    model = trainer.model.eval()
    bar = {"description": f"Stage 2: {search.config.method}", "disable": not search.progress}
    batches = islice(chain.from_iterable(repeat(loader)), search.config.stage2_steps)
    began = time.perf_counter()
    with torch.no_grad(), seen.listening(), trainer.accelerator.autocast():
        screen = Console(stderr=True)
        for batch in track(batches, total=search.config.stage2_steps, console=screen, **bar):
            everything = torch.ones_like(batch["labels"])
            seen.begin(batch.get("attention_mask", everything), steps)
            model(**batch)
            steps += 1
    sums = sum_over_processes(torch.cat([seen.totals, seen.tokens[:, None]], 1).flatten().tolist())
    seconds = on_main_process(lambda: time.perf_counter() - began)
    found = torch.tensor(sums, dtype=torch.float64).view(FOLDS, -1)
    *totals, tokens = found.sum(0).tolist()
    scores = {name: total / tokens for name, total in zip(seen.layers, totals, strict=True)}
    folds = [fold[:-1] / fold[-1] for fold in found if fold[-1] > 0]
    return Scored(scores, steps, seconds, [fold.tolist() for fold in folds])


def _averaged(signal: LayerMean, done: EndedStage) -> Scored:
    return Scored(signal.mean(), done.steps, done.seconds, signal.folds())


def _path_scores(search: Search) -> Scored:
    path = PathGradient(search.updates.layers, search.updates.adapter, stage2.PATH_POINTS)
    # The gates are set by hand; the optimiser only has to leave them alone. Not SGD: an optimiser
    # without state cannot be read back from a checkpoint of FSDP.
    settings = {"optim": "adamw_torch", "learning_rate": 0.0}
    return _averaged(path, _train_scores(search, stage2.ScoreTrainer, signal=path, **settings))


def _trained_scores(search: Search) -> Scored:
    spread = stage2.LogSpread(search.updates.layers, search.updates.adapter, search.log("stage2"))
    rate = search.config.score_learning_rate
    done = _train_scores(search, stage2.ScoreTrainer, callbacks=[spread], learning_rate=rate)
    scores = stage2.read_scores(search.updates.layers, search.updates.adapter)
    return Scored(_unmoved_last(scores, search.config.score_init), done.steps, done.seconds)


def _unmoved_last(scores: Mapping[str, float], start: float) -> dict[str, float]:
    """Rank last what no gradient has moved from the start: a layer that the model never calls."""
    start = torch.tensor(start).item()  # as the parameter holds it
    moved = [score for score in scores.values() if score != start]
    lowest = min(moved, default=start)
    return {name: lowest if score == start else score for name, score in scores.items()}


def _train_scores(search: Search, kind: type[SignalTrainer], **settings: Any) -> EndedStage:
    return train_stage(search, kind, **_stage2_settings(search), **settings)


def _stage2_settings(search: Search) -> dict[str, Any]:
    return {
        "stage": "stage2",
        "title": f"Stage 2: {search.config.method}",
        "steps": search.config.stage2_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1e30,  # clips nothing
        "lr_scheduler_type": "constant",
    }

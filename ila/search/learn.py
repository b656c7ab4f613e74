"""The mask search: ``learn_mask`` trains LoRA until it settles, then scores every layer.

Stage 1 is ordinary LoRA training until the loss is ε-stable or a budget is spent. Stage 2 freezes
everything, gives each layer a gate γ = σ(s), and turns gates into scores by one of ``METHODS``.
Source: Shi et al., "Understanding Layer Significance in LLM Alignment", arXiv 2410.17875.

The parts, ``begin``, ``adapt``, ``score`` and ``mask_of``, are there for who scores one stage 1 in
several ways.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from ila.masks.mask import LayerMask
from ila.models.open_weights import OpenLayers
from ila.runs.atomic import write_folder_atomic, write_json_atomic
from ila.runs.processes import on_main_process
from ila.search.adapter_updates import AdapterUpdates
from ila.search.baselines import POSITIONS, UNTRAINED
from ila.search.config import METHODS, SEARCHES, SearchConfig
from ila.search.gate_gradients import LayerMean, SignalTrainer
from ila.search.methods import Scored, parameters, score
from ila.search.stage import Work, train_stage
from ila.search.stage1 import StopWhenStable
from ila.search.weight_updates import FullUpdates
from ila.training.loop import check_dataset, default_collator, losses

__all__ = ["METHODS", "SearchConfig", "adapt", "begin", "learn_mask", "mask_of", "score"]


def learn_mask(
    peft_model: PeftModel | OpenLayers,
    dataset: Sequence[Mapping[str, Any]],
    config: SearchConfig | None = None,
    *,
    collator: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> LayerMask:
    """Learn how much each LoRA layer of a model, or each layer trained in full, matters.

    Afterwards the model holds the adapter (the weights) as stage 1 left it, every layer open, no
    gates.

    Args:
        peft_model: From ``ila.attach`` or ``ila.convert``, one active adapter, every layer open.
            Or what ``ila.models.open_weights.open_layers`` returned without a mask: stage 1 then
            trains the layers' own weights, and gates turn ΔW = W − W₀ of each.
        dataset: Rows with ``input_ids`` and ``labels`` (-100 where there is no loss), e.g. from
            ``ila.data.encode``.
        config: How to search; ``None`` means the defaults.
        collator: Rows to a batch; ``None`` pads on the right with the model's pad id.
        output_dir: Where the search keeps checkpoints, ``adapter/`` (stage 1; ``changed/`` with
            weights in float32 if they were trained) and ``log.jsonl``; ``None`` keeps nothing.
        resume: Go on from what ``output_dir`` holds of the same search.
        progress: Show progress bars on stderr.

    Returns:
        A mask with every layer open, its scores, and in ``provenance`` the configuration, the
        course of both stages, the free signal of stage 1, what the scores cost in steps and
        seconds, how many parameters each layer trains (a large one may win by its size alone), and
        the scores that eighths of the batches give: how well a ranking repeats.

    Raises:
        ValueError: If the model has no layer to score, a layer is closed or does not take the
            fused path, the data set is empty, or ``output_dir`` holds another search.
        FloatingPointError: If the loss stops being finite.
    """
    if output_dir is None and resume:
        raise ValueError("resume=True needs the output_dir of the search to go on with")
    with tempfile.TemporaryDirectory() if output_dir is None else nullcontext(output_dir) as folder:
        work = begin(
            *(peft_model, dataset, SearchConfig() if config is None else config),
            collator=collator,
            folder=Path(folder),
            keep=output_dir is not None,
            resume=resume,
            progress=progress,
        )
        on_main_process(work.claim)
        training = work.what.model.training
        try:
            stage1 = adapt(work)
            return mask_of(work, stage1, score(work, stage1))
        finally:
            work.what.model.train(training)


def begin(
    peft_model: PeftModel | OpenLayers,
    dataset: Sequence[Mapping[str, Any]],
    config: SearchConfig,
    *,
    collator: Any = None,
    **more: Any,
) -> Work:
    """Check what a search is given; arguments and errors as in ``learn_mask``.

    Args:
        peft_model: What to search.
        dataset: Rows.
        config: How to search.
        collator: Rows to a batch.
        **more: Further fields of ``Work``.
    """
    full = isinstance(peft_model, OpenLayers)
    what = FullUpdates(peft_model) if full else AdapterUpdates(peft_model)
    if full and config.method in set(METHODS) - {*SEARCHES, *POSITIONS}:
        raise ValueError(
            f"method must be one of {(*SEARCHES, *POSITIONS)} where weights are trained in full, "
            f"got {config.method!r}"
        )
    check_dataset(dataset)
    collator = default_collator(what.model) if collator is None else collator
    return Work(what, dataset, collator, config, **more)


def mask_of(work: Work, stage1: Mapping[str, Any], scored: Scored) -> LayerMask:
    """A mask of the scores, every layer open, with all that is known of them."""
    course = {k: v for k, v in stage1.items() if k not in ("gate_gradient", "folds", "seconds")}
    provenance = {
        "config": work.config.as_dict(),
        "stage1": course,
        "stage2": {"steps": scored.steps},
        "signals": {"gate_gradient": stage1["gate_gradient"]},
        "cost": {
            "stage1": {"steps": stage1["steps"], "seconds": stage1["seconds"]},
            "scores": {"steps": scored.steps, "seconds": scored.seconds},
        },
        "parameters": parameters(work.what),
        "folds": [list(fold) for fold in scored.folds],
    }
    mask = LayerMask(scored.scores, provenance=provenance)
    return LayerMask(scored.scores, provenance={**provenance, "spread": mask.spread()})


class _EachStep(TrainerCallback):
    """Calls ``Work.after_step`` with the steps done and the free signal so far."""

    def __init__(self, work: Work, signal: LayerMean):
        self.work, self.signal = work, signal

    def on_step_end(self, args, state, control, **kwargs):
        if self.work.after_step is not None:
            self.work.after_step(state.global_step, self.signal)


def adapt(work: Work) -> dict[str, Any]:
    """Run stage 1, or read what it left; a method that needs none gets an empty course.

    Returns:
        Steps, why it stopped, the course of the loss, the wall time of its steps in seconds, and
        the free signal of the gates with its folds. The model holds what was trained.
    """
    config, done = work.config, work.folder / "stage1.json"
    if config.method in UNTRAINED:
        return {"steps": 0, "gate_gradient": {}, "folds": [], "seconds": 0.0}
    if work.resume and on_main_process(done.exists):
        work.what.load(work.folder / work.what.folder)
        cost = json.loads((work.folder / "cost.json").read_text(encoding="utf-8"))
        return {**json.loads(done.read_text(encoding="utf-8")), **cost}
    signal = work.what.signal()
    stable = StopWhenStable(config.epsilon, config.stability_window)
    trained = train_stage(
        work,
        SignalTrainer,
        stage="stage1",
        title=f"Stage 1: {work.what.trained}",
        steps=config.stage1_steps,
        callbacks=[stable, _EachStep(work, signal)],
        signal=signal,
        learning_rate=config.learning_rate,
        warmup_steps=round(0.03 * config.stage1_steps),
    )
    result = {
        "steps": trained.steps,
        "stopped": "stable" if stable.stable(trained.trainer.state) else "budget",
        **_course([loss for _, loss in losses(trained.trainer)], config.stability_window),
        "gate_gradient": signal.mean(),
        "folds": signal.folds(),
    }
    cost = {"seconds": trained.seconds}
    if work.keep:
        state = work.what.state()
        on_main_process(lambda: _finish_stage1(work, state, result, cost))
    return {**result, **cost}


def _finish_stage1(
    work: Work, state: dict[str, Tensor], result: Mapping[str, Any], cost: Mapping[str, float]
) -> None:
    with write_folder_atomic(work.folder / work.what.folder, replace=True) as target:
        work.what.save(target, state)
    write_json_atomic(work.folder / "cost.json", cost)
    write_json_atomic(work.folder / "stage1.json", result)


def _course(losses: Sequence[float], window: int) -> dict[str, Any]:
    """Mean loss of the first and of the last steps: as many of each, and none in both."""
    window = max(1, min(window, len(losses) // 2))
    first, last = losses[:window], losses[-window:]
    return {
        "first_window_loss": sum(first) / window,
        "last_window_loss": sum(last) / window,
        "loss_window": window,
    }

"""The mask search: ``learn_mask`` trains LoRA until it settles, then scores every layer.

Stage 1 is ordinary LoRA training until the loss is ε-stable or a budget is spent. Stage 2 freezes
everything, gives each layer a gate γ = σ(s), and turns gates into scores by one of ``METHODS``.
Source: Shi et al., "Understanding Layer Significance in LLM Alignment", arXiv 2410.17875.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ila import claims, stages
from ila.baselines import (
    FORWARD,
    POSITIONS,
    UNTRAINED,
    GradientNorm,
    TokenMean,
    by_position,
    refuse_sharded,
    update_norms,
)
from ila.claims import RUN_MARKER
from ila.files import write_folder_atomic, write_json_atomic
from ila.full import OpenLayers
from ila.gated_weights import FullUpdates
from ila.mask import LayerMask
from ila.ranks import on_main_process, sum_over_processes
from ila.search_config import METHODS, SEARCHES, SearchConfig
from ila.signals import LayerMean, PathGradient, SignalTrainer
from ila.stability import StopWhenStable
from ila.trainer import (
    LogFile,
    arguments,
    check_dataset,
    default_collator,
    losses,
    resume_point,
    run,
    stage_callbacks,
)
from ila.updates import AdapterUpdates


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
            Or what ``ila.full.open_layers`` returned without a mask: stage 1 then trains the
            layers' own weights, and gates turn ΔW = W − W₀ of each.
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
        course of both stages and the free signal of stage 1.

    Raises:
        ValueError: If the model has no layer to score, a layer is closed or does not take the
            fused path, the data set is empty, or ``output_dir`` holds another search.
        FloatingPointError: If the loss stops being finite.
    """
    config = SearchConfig() if config is None else config
    what = (
        FullUpdates(peft_model)
        if isinstance(peft_model, OpenLayers)
        else AdapterUpdates(peft_model)
    )
    model = what.model
    if isinstance(what, FullUpdates) and config.method in set(METHODS) - {*SEARCHES, *POSITIONS}:
        raise ValueError(
            f"method must be one of {(*SEARCHES, *POSITIONS)} where weights are trained in full, "
            f"got {config.method!r}"
        )
    check_dataset(dataset)
    collator = default_collator(model) if collator is None else collator
    if output_dir is None and resume:
        raise ValueError("resume=True needs the output_dir of the search to go on with")
    with tempfile.TemporaryDirectory() if output_dir is None else nullcontext(output_dir) as folder:
        work = _Work(
            *(what, dataset, collator, config),
            *(Path(folder), output_dir is not None, resume, progress),
        )
        on_main_process(work.claim)
        training = model.training
        try:
            stage1 = _stage1(work)
            scores, stage2 = _stage2(work, stage1)
        finally:
            model.train(training)
    gate_gradient = stage1.pop("gate_gradient")
    provenance = {
        "config": config.as_dict(),
        "stage1": stage1,
        "stage2": stage2,
        "signals": {"gate_gradient": gate_gradient},
    }
    mask = LayerMask(scores, provenance=provenance)
    return LayerMask(scores, provenance={**provenance, "spread": mask.spread()})


@dataclass(frozen=True)
class _Work:
    """One search: what is searched on which data, and the folder of it."""

    what: AdapterUpdates | FullUpdates
    dataset: Sequence[Mapping[str, Any]]
    collator: Any
    config: SearchConfig
    folder: Path
    keep: bool
    resume: bool
    progress: bool

    def claim(self) -> None:
        """Mark the folder as this search's, or check that it is."""
        if self.keep:
            mine = {"config": self.config.as_dict(), "adapter": self.what.adapter}
            mine |= {"layers": list(self.what.layers), "rows": len(self.dataset)}
            where = {"marker": "search.json", "beside": (RUN_MARKER,)}
            claims.claim(self.folder, mine, resume=self.resume, **where)

    def log(self, stage: str) -> LogFile | None:
        return LogFile(self.folder / "log.jsonl", stage) if self.keep else None

    def save_every(self) -> int | None:
        return self.config.save_every if self.keep else None


def _stage1(work: _Work) -> dict[str, Any]:
    config, done = work.config, work.folder / "stage1.json"
    if config.method in UNTRAINED:
        return {"steps": 0, "gate_gradient": {}}
    if work.resume and on_main_process(done.exists):
        work.what.load(work.folder / work.what.folder)
        return json.loads(done.read_text(encoding="utf-8"))
    signal = work.what.signal()
    stable = StopWhenStable(config.epsilon, config.stability_window)
    trainer = _train(
        work,
        SignalTrainer,
        stage="stage1",
        title="Stage 1: LoRA",
        steps=config.stage1_steps,
        callbacks=[stable],
        signal=signal,
        learning_rate=config.learning_rate,
        warmup_steps=round(0.03 * config.stage1_steps),
    )
    result = {
        "steps": trainer.state.global_step,
        "stopped": "stable" if stable.stable(trainer.state) else "budget",
        **_course([loss for _, loss in losses(trainer)], config.stability_window),
        "gate_gradient": signal.mean(),
    }
    if work.keep:
        state = work.what.state()
        on_main_process(lambda: _finish_stage1(work, state, result))
    return result


def _finish_stage1(work: _Work, state: dict[str, Tensor], result: Mapping[str, Any]) -> None:
    with write_folder_atomic(work.folder / work.what.folder, replace=True) as target:
        work.what.save(target, state)
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


def _stage2(work: _Work, stage1: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    method, what = work.config.method, work.what
    if method == "gate_gradient":
        return stage1["gate_gradient"], {"steps": 0}
    if method in POSITIONS:
        return by_position(list(what.layers), method, work.config.seed), {"steps": 0}
    if method == "update_norm":
        refuse_sharded(what.layers)
        return update_norms(what.layers, what.adapter), {"steps": 0}
    if method == "gradient_norm":
        return _gradient_norms(work)
    if method in FORWARD:
        return _forward_scores(work)
    with what.scored(work.config.score_init):
        by = _path_scores if method == "path" else _trained_scores
        return by(work)


def _gradient_norms(work: _Work) -> tuple[dict[str, float], dict[str, Any]]:
    norms = GradientNorm(work.what.layers, work.what.adapter)
    trainer = _train(work, SignalTrainer, **_stage2_settings(work), signal=norms, learning_rate=0.0)
    return norms.mean(), {"steps": trainer.state.global_step}


def _forward_scores(work: _Work) -> tuple[dict[str, float], dict[str, Any]]:
    """Batches forward alone, the order and placement Trainer's; too short to keep checkpoints."""
    trainer, _ = _trainer(work, SignalTrainer, **_stage2_settings(work), learning_rate=0.0)
    seen, steps = TokenMean(work.what.layers, work.what.adapter, work.config.method), 0
    loader = trainer.get_train_dataloader()
    model = trainer.model.eval()
    bar = {"description": f"Stage 2: {work.config.method}", "disable": not work.progress}
    batches = islice(chain.from_iterable(repeat(loader)), work.config.stage2_steps)
    with torch.no_grad(), seen.listening(), trainer.accelerator.autocast():
        screen = Console(stderr=True)
        for batch in track(batches, total=work.config.stage2_steps, console=screen, **bar):
            seen.begin(batch["attention_mask"])
            model(**batch)
            steps += 1
    *totals, tokens = sum_over_processes([*seen.totals.tolist(), seen.tokens])
    scores = {name: total / tokens for name, total in zip(seen.layers, totals, strict=True)}
    return scores, {"steps": steps}


def _path_scores(work: _Work) -> tuple[dict[str, float], dict[str, Any]]:
    path = PathGradient(work.what.layers, work.what.adapter, stages.PATH_POINTS)
    # The gates are set by hand; the optimiser only has to leave them alone. Not SGD: an optimiser
    # without state cannot be read back from a checkpoint of FSDP.
    trainer = _train_scores(work, signal=path, optim="adamw_torch", learning_rate=0.0)
    return path.mean(), {"steps": trainer.state.global_step}


def _trained_scores(work: _Work) -> tuple[dict[str, float], dict[str, Any]]:
    spread = stages.LogSpread(work.what.layers, work.what.adapter, work.log("stage2"))
    rate = work.config.score_learning_rate
    trainer = _train_scores(work, callbacks=[spread], learning_rate=rate)
    scores = stages.read_scores(work.what.layers, work.what.adapter)
    return scores, {"steps": trainer.state.global_step}


def _train_scores(work: _Work, **settings: Any) -> Trainer:
    return _train(work, stages.ScoreTrainer, **_stage2_settings(work), **settings)


def _stage2_settings(work: _Work) -> dict[str, Any]:
    return {
        "stage": "stage2",
        "title": f"Stage 2: {work.config.method}",
        "steps": work.config.stage2_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1e30,  # clips nothing
        "lr_scheduler_type": "constant",
    }


def _train(work: _Work, trainer_class: type[SignalTrainer], **options: Any) -> Trainer:
    """Run one stage to its end, from its last complete checkpoint when resuming."""
    trainer, start = _trainer(work, trainer_class, **options)
    run(trainer, start)
    return trainer


def _trainer(
    work: _Work,
    trainer_class: type[SignalTrainer],
    *,
    stage: str,
    title: str,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
    signal: LayerMean | None = None,
    **settings: Any,
) -> tuple[Trainer, Path | None]:
    """The Trainer of one stage, and the checkpoint that it goes on from."""
    folder = work.folder / stage
    extra = work.config.training_args
    if stage == "stage2":
        extra = {name: value for name, value in extra.items() if name not in settings}
    args = arguments(
        folder,
        steps=steps,
        save_every=work.save_every(),
        extra=extra,
        per_device_train_batch_size=work.config.batch_size,
        seed=work.config.seed,
        **settings,
    )
    own = stage_callbacks(
        title, work.log(stage), progress=work.progress, also_save=signal and signal.save
    )
    signals = [] if signal is None else [signal]
    callbacks = [*signals, *callbacks, *own]
    make = work.what.trainer(trainer_class)
    trainer = make(args, work.collator, work.dataset, callbacks=callbacks)
    trainer.signal = signal
    start = resume_point(folder, work.resume)
    if start is not None and signal is not None:
        signal.load(start)
    return trainer, start

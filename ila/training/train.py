"""Selective training on ``transformers.Trainer``: the open layers of a mask, by LoRA or in full."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ila.boundary import writing
from ila.data import token_count
from ila.models.open_weights import OpenLayers
from ila.prefix.cache import PrefixCache
from ila.runs.atomic import move_in, write_json_atomic
from ila.runs.checkpoints import LOGS, keep_logs
from ila.runs.folder import RUN_MARKER, claim
from ila.runs.meter import StepMeter
from ila.runs.metrics import load_run
from ila.runs.processes import on_main_process, owning
from ila.runs.records import NUMBER, or_null, read_record
from ila.training.adapter import Adapter
from ila.training.arguments import arguments
from ila.training.callbacks import LogFile, stage_callbacks
from ila.training.card import write_card
from ila.training.config import TrainConfig
from ila.training.loop import (
    check_dataset,
    default_collator,
    held_out_loss,
    losses,
    resume_point,
    run,
)
from ila.training.trained import Trained

_BEFORE = {"held_out_loss_before": or_null(NUMBER)}
PREFIX_FOLDER = "prefix-cache"
BEFORE_FILE = "before.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Begun:
    """What a training finds in its folder where it goes on with a run that has begun there.

    Attributes:
        files: Names of what is in the folder.
        finish: Adds to the metrics what the run knows, given those of this part and its meter.
    """

    files: tuple[str, ...]
    finish: Callable[[dict[str, Any], StepMeter], dict[str, Any]]


def train(
    peft_model: PeftModel | OpenLayers,
    dataset: Sequence[Mapping[str, Any]],
    config: TrainConfig | None = None,
    *,
    held_out: Sequence[Mapping[str, Any]] | None = None,
    collator: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    name: str = "run",
    begun: Begun | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Train the open layers of a model and measure what that cost.

    Args:
        peft_model: With or without a mask applied; what requires grad is trained. Or what
            ``ila.models.open_weights.open_layers`` returned, to train the layers' own weights.
        dataset: Rows with ``input_ids`` and ``labels``.
        config: ``None`` means the defaults.
        held_out: Rows to measure the loss on, before and after; ``None`` measures none.
        collator: Rows to a batch; ``None`` pads on the right with the model's pad id.
        output_dir: Gets a plain PEFT adapter (or ``changed.safetensors``), ``metrics.json``
            (written last: a folder that has it is finished) and ``log.jsonl``; ``None`` writes
            nothing.
        resume: Go on from what ``output_dir`` holds of the same run. A finished run is returned.
        progress: Show a progress bar on stderr.
        name: What the run is called in reports.
        begun: Where the run has begun in ``output_dir`` and goes on here; needs ``resume``.
        tokenizer: Is saved beside an adapter; ``None`` saves none.

    Returns:
        The metrics: steps, losses, held-out loss before and after (nats per answer token), step
        time in ms (median, p10, p90), peak memory in bytes or None where unknown, layers open.

    Raises:
        ValueError: If nothing requires grad, a data set is empty, or ``output_dir`` holds another
            run.
        FloatingPointError: If the loss stops being finite.
    """
    config = TrainConfig() if config is None else config
    check_dataset(dataset)
    part: Trained = peft_model if isinstance(peft_model, OpenLayers) else Adapter(peft_model)
    model, counts = part.model, part.counts()
    collator = default_collator(model) if collator is None else collator
    if output_dir is None and resume:
        raise ValueError("resume=True needs the output_dir of the run to go on with")
    kept = None if output_dir is None else Path(output_dir)
    with (
        owning(kept),
        tempfile.TemporaryDirectory() if kept is None else nullcontext(kept) as folder,
    ):
        out = Path(folder)
        if output_dir is not None:
            names = [n for n, p in model.named_parameters() if p.requires_grad]
            mine = {"config": config.as_dict(), **counts, "rows": len(dataset), "trained": names}
            beside = (RUN_MARKER, *(() if begun is None else begun.files))
            where = {"marker": "train.json", "beside": beside}
            on_main_process(lambda: claim(out, mine, resume=resume, **where))
            if resume and on_main_process((out / "metrics.json").exists):
                part.load(out)
                return load_run(out)
        args = arguments_of(config, out / "checkpoints", keep=output_dir is not None)
        costs = StepMeter(args.device)
        log = LogFile(out / "log.jsonl", "train") if output_dir is not None else None
        own = stage_callbacks(f"Training {name}", log, progress=progress, also_save=costs.save)
        trainer = part.trainer_class()(model, args, collator, dataset, callbacks=[costs, *own])
        before = _held_out(trainer, held_out, collator, config, out)
        start = resume_point(out / "checkpoints", resume)
        if start is not None:
            costs.load(start)
        cache = _prefix_cache(trainer, config, out, progress) if config.cache_prefix else None
        costs.begin()
        with nullcontext() if cache is None else cache.skipping():
            run(trainer, start)
        measured = costs.measured()  # before the held-out loss, which is not training
        after = _loss(trainer, held_out, collator, config)
        metrics = {
            "name": name,
            **counts,
            "steps": trainer.state.global_step,
            "held_out_loss_before": before,
            "held_out_loss": after,
            **measured,
            "tokens_per_step": _tokens_per_step(dataset, args),
            "losses": losses(trainer),
            "prefix_cache": None if cache is None else cache.as_dict(),
            "device": str(args.device),
            "dtype": _dtype_text(model),
            "config": config.as_dict(),
        }
        if begun is not None:
            metrics = begun.finish(metrics, costs)
        if output_dir is not None:
            state = part.state()
            on_main_process(lambda: _save(part, state, out, metrics, tokenizer))
    return metrics


def arguments_of(config: TrainConfig, folder: Path, *, keep: bool) -> TrainingArguments:
    """Return Trainer's arguments for a configuration; checkpoints go into ``folder``."""
    return arguments(
        folder,
        steps=config.steps,
        save_every=config.save_every if keep else None,
        extra=config.training_args,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=round(0.03 * config.steps),
        seed=config.seed,
    )


def _dtype_text(model: nn.Module) -> str:
    packing = getattr(getattr(model, "config", None), "quantization_config", None)
    method = getattr(packing, "quantization_method", None)
    text = str(model.dtype).removeprefix("torch.")
    return f"{text} over {method()}" if callable(method) else text


def _tokens_per_step(dataset: Sequence[Mapping[str, Any]], args: TrainingArguments) -> float:
    """Tokens of an optimiser step on average, padding left out, over all devices."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows * sum(token_count(row) for row in dataset) / len(dataset)


def _held_out(trainer, held_out, collator, config, out: Path) -> float | None:
    """Loss before training; a resumed run reads what the first start measured."""
    file = out / BEFORE_FILE
    known = on_main_process(lambda: read_record(file, _BEFORE) if file.exists() else None)
    if known is not None:
        return known["held_out_loss_before"]
    before = _loss(trainer, held_out, collator, config)
    on_main_process(lambda: write_json_atomic(file, {"held_out_loss_before": before}))
    return before


def _loss(trainer, held_out, collator, config) -> float | None:
    if not held_out:
        return None
    return held_out_loss(trainer.model, held_out, collator, config.batch_size)


def _prefix_cache(trainer: Trainer, config: TrainConfig, out: Path, progress: bool) -> PrefixCache:
    """Let a trainer read cached states in place of tokens."""
    if trainer.args.neftune_noise_alpha:
        raise ValueError("cache_prefix would not be exact: NEFTune adds noise to the embeddings")
    if trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no":
        raise ValueError(
            "cache_prefix would not be exact: in mixed precision FSDP rounds the weights of its "
            "blocks, and the states are computed by one process with whole weights"
        )
    cache = PrefixCache.prepare(
        trainer.model,
        trainer.train_dataset,
        trainer.data_collator,
        out / PREFIX_FOLDER if config.cache_prefix is True else Path(config.cache_prefix),
        batch_size=config.batch_size,
        limit_bytes=int(config.cache_limit_gib * 2**30),
        autocast=trainer.accelerator.autocast,
        progress=progress,
    )
    trainer.train_dataset, trainer.data_collator = cache.dataset, cache.collator
    return cache


def _save(
    part: Trained,
    state: dict[str, Tensor],
    out: Path,
    metrics: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """The weights, then the metrics, then the checkpoints go: each step leaves a usable folder.

    Each is on the disk before the next begins, so that this holds for a power failure too.
    """
    for left_over in out.glob(".adapter-*"):  # of a run killed while it saved
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(dir=out, prefix=".adapter-") as folder:
        with writing(out):
            part.save(Path(folder), state)
            if isinstance(part, Adapter):
                write_card(Path(folder), part.model, part.adapter, metrics)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        move_in(folder, out)
    write_json_atomic(out / "metrics.json", metrics)
    (out / BEFORE_FILE).unlink(missing_ok=True)
    keep_logs(out / "checkpoints", out / LOGS)
    for folder in ("checkpoints", PREFIX_FOLDER):
        shutil.rmtree(out / folder, ignore_errors=True)

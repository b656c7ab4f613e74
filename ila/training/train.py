"""Train the open layers of a mask on ``transformers.Trainer``, by LoRA or in full."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ila.boundary import writing
from ila.data import token_count
from ila.data.contracts import Collate, Dataset
from ila.models.open_weights import OpenLayers
from ila.prefix.cache import PrefixCache
from ila.runs.atomic import move_in, write_json_atomic
from ila.runs.checkpoints import LOGS, keep_logs
from ila.runs.folder import RUN_MARKER, claim
from ila.runs.meter import StepMeter
from ila.runs.metrics import LayerCounts, Metrics, load_run
from ila.runs.processes import on_main_process, owning, processes
from ila.runs.records import NUMBER, or_null, read_record
from ila.training.adapter import Adapter
from ila.training.arguments import arguments
from ila.training.callbacks import LogFile, stage_callbacks
from ila.training.card import write_card
from ila.training.checks import check_settings
from ila.training.config import TrainConfig
from ila.training.evaluation import HeldOutTrainer, evaluate_on, evaluated
from ila.training.loop import (
    check_dataset,
    default_collator,
    held_out_loss,
    losses,
    resume_point,
    run,
)
from ila.training.loraplus import with_loraplus
from ila.training.packing import packing_collator
from ila.training.trained import Trained
from ila.training.verdicts import FILE as VERDICTS
from ila.training.verdicts import record

_BEFORE = {"held_out_loss_before": or_null(NUMBER)}
PREFIX_FOLDER, CHECKPOINTS = "prefix-cache", "checkpoints"
BEFORE_FILE = "before.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Begun:
    """A run that has begun in its folder and continues here.

    Attributes:
        files: Names of the files in the folder.
        finish: Adds the knowledge of the run to the metrics, given the meter of this part.
    """

    files: tuple[str, ...]
    finish: Callable[[Metrics, StepMeter], Metrics]


def train(
    peft_model: PeftModel | OpenLayers,
    dataset: Dataset,
    config: TrainConfig | None = None,
    *,
    held_out: Dataset | None = None,
    collator: Collate | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    name: str = "run",
    begun: Begun | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Metrics:
    """Train the open layers of a model, and measure loss, time and memory.

    Args:
        peft_model: Model with or without a mask; the parameters that require grad train. Or the
            result of ``ila.models.open_weights.open_layers``, to train the layers' own weights.
        dataset: Rows with ``input_ids`` and ``labels``.
        config: Options; ``None`` takes the defaults.
        held_out: Rows to measure the loss on, before and after; ``None`` measures none.
        collator: Turns rows into a batch; ``None`` pads on the right with the model's pad id.
        output_dir: Folder for a plain PEFT adapter (or ``changed.safetensors``), ``metrics.json``
            (written last: a folder that has it is finished) and ``log.jsonl``; ``None`` writes no
            files.
        resume: Continue the run that ``output_dir`` holds; return the result of a finished run.
        progress: Whether to show a progress bar on stderr.
        name: Name of the run in reports.
        begun: Run that has begun in ``output_dir`` and continues here; needs ``resume``.
        tokenizer: Tokenizer to save beside an adapter.
        callbacks: Callbacks for ``transformers.Trainer``.

    Returns:
        The metrics: steps, losses, held-out loss before and after (nats per answer token), step
        time in ms (median, p10, p90), peak memory in bytes or None where unknown, layers open.

    Raises:
        ValueError: If no parameter requires grad, a data set is empty, or ``output_dir`` holds
            another run.
        FloatingPointError: If the loss stops being finite.
    """
    check_dataset(dataset)
    config = (config or TrainConfig()).for_rows(len(dataset), processes().num_processes)
    part: Trained = peft_model if isinstance(peft_model, OpenLayers) else Adapter(peft_model)
    counts = part.counts()
    collator = collator or default_collator(part.model)
    if output_dir is None and resume:
        raise ValueError("resume=True needs the output_dir of the run to go on with")
    kept = None if output_dir is None else Path(output_dir)
    check_training(config, part.model, dataset, held_out)
    with (
        owning(kept),
        tempfile.TemporaryDirectory() if kept is None else nullcontext(kept) as folder,
    ):
        data = dataset, config, held_out, collator, Path(folder), callbacks
        training = _Training(part, counts, *data)
        if kept is None:
            return training.run(name, keep=False, resume=False, progress=progress).metrics
        training.claim(resume, () if begun is None else begun.files)
        if resume and on_main_process((kept / "metrics.json").exists):
            part.load(kept)
            return load_run(kept)
        ended, state = training.run(name, keep=True, resume=resume, progress=progress), part.state()
        metrics = ended.metrics if begun is None else begun.finish(*ended)
        on_main_process(lambda: _save(part, state, kept, metrics, tokenizer))
    return metrics


class _Ended(NamedTuple):
    metrics: Metrics
    meter: StepMeter


@dataclass(frozen=True)
class _Training:
    """Part of a model to train, its data, its options and its folder."""

    part: Trained
    counts: LayerCounts
    dataset: Dataset
    config: TrainConfig
    held_out: Dataset | None
    collator: Collate
    folder: Path
    callbacks: Sequence[TrainerCallback]

    def claim(self, resume: bool, files: Sequence[str]) -> None:
        """Claim the folder for this training, or check that it belongs to it."""
        parameters = self.part.model.named_parameters()
        mine = {
            "config": self.config.as_dict(),
            **self.counts,
            "rows": len(self.dataset),
            "trained": [name for name, p in parameters if p.requires_grad],
        }
        beside = (RUN_MARKER, VERDICTS, *files)
        on_main_process(
            lambda: claim(self.folder, mine, marker="train.json", resume=resume, beside=beside)
        )

    def run(self, name: str, *, keep: bool, resume: bool, progress: bool) -> _Ended:
        """Train to the end, and measure."""
        checkpoints = self.folder / CHECKPOINTS
        args = arguments_of(self.config, checkpoints, keep=keep)
        meter = StepMeter(args.device)
        trainer = self._trainer(args, meter, f"Training {name}", keep, progress)
        before = self._loss_before(trainer)
        start = resume_point(checkpoints, resume)
        if start is not None:
            meter.load(start)
        cache = self._prefix_cache(trainer, progress) if self.config.cache_prefix else None
        meter.begin()
        with nullcontext(nullcontext) if cache is None else cache.skipping() as whole:
            trainer.whole = whole
            run(trainer, start)
        measured = meter.measured()  # before the held-out loss, which is not training
        metrics: Metrics = {
            "name": name,
            **self.counts,
            "steps": trainer.state.global_step,
            "held_out_loss_before": before,
            "held_out_loss": self._loss(trainer),
            **measured,
            "tokens_per_step": _tokens_per_step(self.dataset, args),
            "losses": losses(trainer),
            **evaluated(trainer, self.config.eval_every),
            "prefix_cache": None if cache is None else cache.as_dict(),
            "device": str(args.device),
            "dtype": _dtype_text(self.part.model),
            "verdicts": record(),
            "config": self.config.as_dict(),
        }
        return _Ended(metrics, meter)

    def _trainer(
        self, args: TrainingArguments, meter: StepMeter, title: str, keep: bool, progress: bool
    ) -> HeldOutTrainer:
        log = LogFile(self.folder / "log.jsonl", "train") if keep else None
        own = stage_callbacks(
            title, log, progress=progress, also_save=meter.save, more=self.callbacks
        )
        kind = with_loraplus(HeldOutTrainer, self.config.loraplus_lr_ratio)
        trainer = self.part.trainer_class(kind)(
            self.part.model,
            args,
            packing_collator() if self.config.packing else self.collator,
            self.dataset,
            eval_dataset=self.held_out,
            callbacks=[meter, *own],
        )
        if self.held_out:
            evaluate_on(trainer, self.held_out, self.collator, self.config.batch_size)
        return trainer

    def _loss_before(self, trainer: Trainer) -> float | None:
        """Return the loss before training; a resumed run reads the value of its first start."""
        file = self.folder / BEFORE_FILE
        known = on_main_process(lambda: read_record(file, _BEFORE) if file.exists() else None)
        if known is not None:
            return known["held_out_loss_before"]
        before = self._loss(trainer)
        on_main_process(lambda: write_json_atomic(file, {"held_out_loss_before": before}))
        return before

    def _loss(self, trainer: Trainer) -> float | None:
        if not self.held_out:
            return None
        return held_out_loss(trainer.model, self.held_out, self.collator, self.config.batch_size)

    def _prefix_cache(self, trainer: Trainer, progress: bool) -> PrefixCache:
        """Let a trainer read cached states in place of tokens."""
        _check_cacheable(trainer)
        config = self.config
        own = self.folder / PREFIX_FOLDER
        cache = PrefixCache.prepare(
            trainer.model,
            trainer.train_dataset,
            trainer.data_collator,
            own if config.cache_prefix is True else Path(config.cache_prefix),
            batch_size=config.batch_size,
            limit_bytes=int(config.cache_limit_gib * 2**30),
            autocast=trainer.accelerator.autocast,
            progress=progress,
        )
        trainer.train_dataset, trainer.data_collator = cache.dataset, cache.collator
        return cache


def _check_cacheable(trainer: Trainer) -> None:
    if trainer.args.neftune_noise_alpha:
        raise ValueError("cache_prefix would not be exact: NEFTune adds noise to the embeddings")
    if trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no":
        raise ValueError(
            "cache_prefix would not be exact: in mixed precision FSDP rounds the weights of its "
            "blocks, and the states are computed by one process with whole weights"
        )


def arguments_of(config: TrainConfig, folder: Path, *, keep: bool) -> TrainingArguments:
    """Return Trainer's arguments for a configuration; checkpoints go into ``folder``."""
    return arguments(
        folder,
        steps=config.steps,
        save_every=config.save_every if keep else None,
        eval_every=config.eval_every,
        extra=config.training_args,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=round(0.03 * config.steps),
        seed=config.seed,
    )


def check_training(
    config: TrainConfig, model: nn.Module, dataset: Dataset, held_out: Dataset | None
) -> None:
    """Raise if a training cannot begin with these settings; see ``check_settings``."""
    config = config.for_rows(len(dataset), processes().num_processes)
    args = arguments_of(config, Path(CHECKPOINTS), keep=False)
    check_settings(config, args, model, dataset, held_out)


def _dtype_text(model: nn.Module) -> str:
    packing = getattr(getattr(model, "config", None), "quantization_config", None)
    method = getattr(packing, "quantization_method", None)
    text = str(model.dtype).removeprefix("torch.")
    return f"{text} over {method()}" if callable(method) else text


def _tokens_per_step(dataset: Dataset, args: TrainingArguments) -> float:
    """Return the mean tokens of an optimiser step over all devices, without padding."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows * sum(token_count(row) for row in dataset) / len(dataset)


def _save(
    part: Trained,
    state: dict[str, Tensor],
    out: Path,
    metrics: Metrics,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write the weights, then the metrics, then remove the checkpoints.

    Each step leaves a usable folder and reaches the disk before the next, so that a power failure
    leaves a usable folder too.
    """
    for left_over in out.glob(".adapter-*"):  # a run killed while saving leaves these
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
    keep_logs(out / CHECKPOINTS, out / LOGS)
    for folder in (CHECKPOINTS, PREFIX_FOLDER):
        shutil.rmtree(out / folder, ignore_errors=True)

"""Run once: train all layers, score and choose them, and continue with the open ones.

    all layers, steps 1 … k  →  scores, mask, checkpoint of the switch  →  open layers, steps k+1 …

The second part is another Trainer that resumes from the checkpoint of the switch: it makes its
optimiser, buckets and shards for the open layers alone, and may use the prefix cache. The files on
the disk decide where a run continues: ``mask.json`` comes after a whole switch.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ila.data.contracts import Collate, Dataset
from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.models.adalora import tuner_of
from ila.models.edit import apply_mask
from ila.runs.atomic import write_json_atomic
from ila.runs.checkpoints import LOGS, is_finished, keep_logs
from ila.runs.folder import RUN_MARKER, claim
from ila.runs.meter import StepMeter
from ila.runs.metrics import Metrics
from ila.runs.processes import on_main_process, processes
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import LayerMean, SignalTrainer
from ila.search.selection import Selection, drawn_batches
from ila.training.callbacks import LogFile, stage_callbacks
from ila.training.config import TrainConfig
from ila.training.evaluation import evaluate_on
from ila.training.loop import (
    check_dataset,
    default_collator,
    held_out_loss,
    resume_point,
    run,
    shard,
)
from ila.training.loraplus import with_loraplus
from ila.training.packing import packing_collator
from ila.training.switch import optimizer_names, write_switch
from ila.training.train import (
    ADAPTER_FILES,
    BEFORE_FILE,
    CHECKPOINTS,
    PREFIX_FOLDER,
    Begun,
    arguments_of,
    check_training,
    train,
)

MARKER, MASK, SEARCH = "selection.json", "mask.json", "search"
_FILES = (MARKER, MASK, SEARCH, CHECKPOINTS, BEFORE_FILE, PREFIX_FOLDER, "log.jsonl", "heatmap.png")


@dataclass(frozen=True)
class OneRun:
    """Parts that both halves of a run share.

    Attributes:
        updates: Adapter, every layer open at first.
        dataset: Rows to train on.
        config: Options; its steps count both halves.
        selection: Time and way of the selection.
        folder: Folder of the run.
        held_out: Rows to measure the loss on.
        collator: Turns rows into a batch.
        resume: Whether to continue the run that the folder holds.
        progress: Whether to show progress bars.
        name: Name of the run.
        callbacks: Callbacks of the user.
        tokenizer: Tokenizer to save beside the adapter.
    """

    updates: AdapterUpdates
    dataset: Dataset
    config: TrainConfig
    selection: Selection
    folder: Path
    held_out: Dataset | None
    collator: Collate
    resume: bool
    progress: bool
    name: str
    callbacks: Sequence[TrainerCallback] = ()
    tokenizer: PreTrainedTokenizerBase | None = None


def train_and_select(
    peft_model: PeftModel,
    dataset: Dataset,
    config: TrainConfig,
    selection: Selection,
    *,
    held_out: Dataset | None = None,
    collator: Collate | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    name: str = "run",
    callbacks: Sequence[TrainerCallback] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Metrics, LayerMask]:
    """Train all layers for a while, then the selected ones, as one run.

    Args:
        peft_model: Model of ``ila.attach`` or ``ila.convert``, one active adapter, every layer
            open.
        dataset: Rows with ``input_ids`` and ``labels``.
        config: Options of the training. ``cache_prefix`` begins with the selection.
        selection: Time and way of the selection.
        held_out: As in ``ila.training.train.train``, and so are the arguments that follow.
        collator: Turns rows into a batch.
        output_dir: Folder for ``mask.json`` and the files of ``train``.
        resume: Continue the run that ``output_dir`` holds, in either half.
        progress: Whether to show progress bars on stderr.
        name: Name of the run in reports.
        callbacks: Callbacks for ``transformers.Trainer``, in both halves.
        tokenizer: Tokenizer to save beside the adapter.

    Returns:
        The metrics of ``train`` with the times of the open layers, and with ``search``: the cost of
        the first half. And the mask.

    Raises:
        ValueError: If a layer is closed already or cannot be scored, the switch leaves no steps
            before or after it, a data set is empty, or ``output_dir`` holds another run.
        FloatingPointError: If the loss stops being finite.
    """
    _check(peft_model, dataset)
    config = config.for_rows(len(dataset), processes().num_processes)
    step = selection.step(config.steps)
    with tempfile.TemporaryDirectory() if output_dir is None else nullcontext(output_dir) as folder:
        both = OneRun(
            AdapterUpdates(peft_model),
            dataset,
            config,
            selection,
            Path(folder),
            held_out,
            default_collator(peft_model) if collator is None else collator,
            *(resume, progress, name, callbacks, tokenizer),
        )
        check_training(config, peft_model, dataset, held_out)
        return _go(both, step)


def _go(both: OneRun, step: int) -> tuple[Metrics, LayerMask]:
    """Run both parts; a resumed run begins in the part that it was in."""
    _claim(both)
    has_switched = both.resume and on_main_process((both.folder / MASK).exists)
    if not has_switched:
        _first_part(both, step)
    mask = LayerMask.load(both.folder / MASK)
    apply_mask(both.updates.model, mask, closed=both.selection.closed)
    if has_switched:
        _load_kept(both)
    metrics = _second_part(both, mask)
    on_main_process(lambda: _remove_search(both.folder))
    return metrics, mask


def _check(peft_model: PeftModel, dataset: Dataset) -> None:
    check_dataset(dataset)
    if tuner_of(peft_model) is not None:
        raise ValueError(
            "peft_model must have a LoRA adapter to select in the middle of a run, got AdaLoRA; "
            "learn a mask first (ila.learn_mask), and train under it"
        )


def _claim(both: OneRun) -> None:
    mine = {
        "config": both.config.as_dict(),
        "selection": both.selection.as_dict(),
        "rows": len(both.dataset),
    }
    on_main_process(
        lambda: claim(both.folder, mine, marker=MARKER, resume=both.resume, beside=(RUN_MARKER,))
    )


def _load_kept(both: OneRun) -> None:
    """Read the updates of kept layers, which FSDP leaves out when it loads a checkpoint."""
    start = resume_point(both.folder / CHECKPOINTS, True)
    if start is not None and on_main_process((start / ADAPTER_FILES[0]).exists):
        both.updates.load(start)


def _second_part(both: OneRun, mask: LayerMask) -> Metrics:
    return train(
        both.updates.model,
        both.dataset,
        both.config,
        held_out=both.held_out,
        collator=both.collator,
        output_dir=both.folder,
        resume=True,
        progress=both.progress,
        name=both.name,
        callbacks=both.callbacks,
        tokenizer=both.tokenizer,
        begun=Begun(_FILES, lambda metrics, meter: _finish(metrics, meter, mask)),
    )


def _remove_search(folder: Path) -> None:
    """Remove the checkpoints of the first part, and keep the logs of other libraries."""
    keep_logs(folder / SEARCH, folder / LOGS / SEARCH)
    shutil.rmtree(folder / SEARCH, ignore_errors=True)


class _StopAt(TrainerCallback):
    """End the first part with a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def _first_part(both: OneRun, step: int) -> None:
    """Train all layers, choose, and write the checkpoint of the switch and the mask."""
    search = both.folder / SEARCH
    meter, trainer = _all_layers(both, step)
    _check_processes(both, trainer)
    signal = trainer.signal
    _measure_before(both, trainer)
    start = resume_point(search, both.resume)
    if start is not None:
        signal.load(start)
        meter.load(start)
    names = optimizer_names(trainer)
    if start is not None and is_finished(start):
        shard(trainer)  # scores have the same bits as right after the last step
    meter.begin()
    run(trainer, start)
    began = time.perf_counter()
    mask = _chosen(both, trainer, signal, step)
    took = {
        "steps": step,
        "seconds": sum(meter.times_ms) / 1e3,
        "choosing_seconds": time.perf_counter() - began,
        **meter.measured(),
    }
    mask = mask.with_provenance(took=took)
    apply_mask(both.updates.model, mask, closed=both.selection.closed)
    state = both.updates.state()
    trained = {name: p.requires_grad for name, p in both.updates.model.named_parameters()}

    def switch() -> None:
        write_switch(
            search / f"checkpoint-{step}",
            both.folder / CHECKPOINTS,
            names,
            trained,
            lambda folder: both.updates.save(folder, state),
        )
        mask.save(both.folder / MASK)

    on_main_process(switch)


def _check_processes(both: OneRun, trainer: Trainer) -> None:
    """Raise where several processes cannot run both parts."""
    if trainer.is_deepspeed_enabled or (
        trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    ):
        raise ValueError(
            "a run with a selection needs one process, DDP or FSDP2, got DeepSpeed or FSDP1; "
            "use ila learn, ila select and ila train --mask --from"
        )
    if trainer.is_fsdp_enabled and both.config.cache_prefix:
        raise ValueError(
            "cache_prefix must be off in a run with a selection under FSDP: one process computes "
            "the states, and the model is sharded by then; use ila train --mask --from"
        )


def _all_layers(both: OneRun, step: int) -> tuple[StepMeter, SignalTrainer]:
    """Make the trainer of all layers, and its meter."""
    args = arguments_of(both.config, both.folder / SEARCH, keep=True)
    signal, meter = both.updates.signal(), StepMeter(args.device)

    def save(checkpoint: Path) -> None:
        signal.save(checkpoint)
        meter.save(checkpoint)

    log = LogFile(both.folder / "log.jsonl", "train")
    title = f"Training {both.name}, all layers to step {step}"
    own = stage_callbacks(title, log, progress=both.progress, also_save=save, more=both.callbacks)
    trainer = both.updates.trainer_class(
        with_loraplus(SignalTrainer, both.config.loraplus_lr_ratio)
    )(
        both.updates.model,
        args,
        packing_collator() if both.config.packing else both.collator,
        both.dataset,
        eval_dataset=both.held_out,
        callbacks=[meter, _StopAt(step), *own],
    )
    trainer.signal = signal
    if both.held_out:
        evaluate_on(trainer, both.held_out, both.collator, both.config.batch_size)
    return meter, trainer


def _measure_before(both: OneRun, trainer: Trainer) -> None:
    file, held_out = both.folder / BEFORE_FILE, both.held_out
    if on_main_process(file.exists):
        return
    before = None
    if held_out:
        before = held_out_loss(trainer.model, held_out, both.collator, both.config.batch_size)
    on_main_process(lambda: write_json_atomic(file, {"held_out_loss_before": before}))


def _chosen(both: OneRun, trainer: Trainer, signal: LayerMean, step: int) -> LayerMask:
    args = trainer.args
    own = drawn_batches(both.dataset, both.collator, args.train_batch_size, args.seed, args.device)
    return both.selection.choose(both.updates, signal, own, step)


def _finish(metrics: Metrics, meter: StepMeter, mask: LayerMask) -> Metrics:
    """Add the first part to the metrics of the second."""
    took = thawed(mask.provenance["took"])
    peaks = [took["peak_memory_bytes"], metrics["peak_memory_bytes"]]
    return {
        **metrics,
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "selected": {
            "search": took,
            "seconds": sum(meter.times_ms) / 1e3,
            "peak_memory_bytes": peaks[1],
            "selection": thawed(mask.provenance["selection"]),
        },
    }

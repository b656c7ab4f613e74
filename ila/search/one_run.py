"""One run: all layers train, the layers are scored and chosen, and the open ones go on.

    all layers, steps 1 … k  →  scores, mask, checkpoint of the switch  →  open layers, steps k+1 …

The second part is a Trainer of its own that resumes from the checkpoint of the switch: it makes its
optimiser, buckets and shards for the open layers alone, and may use the prefix cache. What is on
the disk decides what is still to do: ``mask.json`` is written once the switch is whole.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback

from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.models.edit import apply_mask
from ila.runs.atomic import write_json_atomic
from ila.runs.folder import RUN_MARKER, claim
from ila.runs.meter import StepMeter
from ila.runs.processes import on_main_process
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import LayerMean, SignalTrainer
from ila.search.selection import Selection, drawn_batches
from ila.training.callbacks import LogFile, stage_callbacks
from ila.training.config import TrainConfig
from ila.training.loop import check_dataset, default_collator, held_out_loss, resume_point, run
from ila.training.switch import optimizer_names, write_switch
from ila.training.train import BEFORE_FILE, PREFIX_FOLDER, Begun, arguments_of, train

MARKER, MASK, SEARCH, CHECKPOINTS = "selection.json", "mask.json", "search", "checkpoints"
_FILES = (MARKER, MASK, SEARCH, CHECKPOINTS, BEFORE_FILE, PREFIX_FOLDER, "log.jsonl", "heatmap.png")


@dataclass(frozen=True)
class OneRun:
    """What both parts of a run share.

    Attributes:
        updates: The adapter, every layer open at first.
        dataset: Rows to train on.
        config: How to train; its steps are those of both parts.
        selection: When and how to select.
        folder: Of the run.
        held_out: Rows to measure the loss on.
        collator: Rows to a batch.
        resume: Whether to go on from what the folder holds.
        progress: Whether to show progress bars.
        name: What the run is called.
    """

    updates: AdapterUpdates
    dataset: Sequence[Mapping[str, Any]]
    config: TrainConfig
    selection: Selection
    folder: Path
    held_out: Sequence[Mapping[str, Any]] | None
    collator: Any
    resume: bool
    progress: bool
    name: str


def train_and_select(
    peft_model: PeftModel,
    dataset: Sequence[Mapping[str, Any]],
    config: TrainConfig,
    selection: Selection,
    *,
    held_out: Sequence[Mapping[str, Any]] | None = None,
    collator: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    name: str = "run",
) -> tuple[dict[str, Any], LayerMask]:
    """Train all layers for a while, then the selected ones, as one run.

    Args:
        peft_model: From ``ila.attach`` or ``ila.convert``, one active adapter, every layer open.
        dataset: Rows with ``input_ids`` and ``labels``.
        config: How to train. ``cache_prefix`` begins with the selection.
        selection: When and how to select.
        held_out: As in ``ila.training.train.train``, and so are the arguments that follow.
        collator: Rows to a batch.
        output_dir: Gets ``mask.json`` beside what ``train`` writes.
        resume: Go on from what ``output_dir`` holds of the same run, whichever part it was in.
        progress: Show progress bars on stderr.
        name: What the run is called in reports.

    Returns:
        The metrics of ``train``, whose times are those of the open layers, with ``search``: what
        the first part took. And the mask.

    Raises:
        ValueError: If a layer is closed already or cannot be scored, the switch leaves no steps
            before or after it, a data set is empty, or ``output_dir`` holds another run.
        FloatingPointError: If the loss stops being finite.
    """
    check_dataset(dataset)
    step = selection.step(config.steps)
    collator = default_collator(peft_model) if collator is None else collator
    with tempfile.TemporaryDirectory() if output_dir is None else nullcontext(output_dir) as folder:
        out, updates = Path(folder), AdapterUpdates(peft_model)
        mine = {"config": config.as_dict(), "selection": selection.as_dict(), "rows": len(dataset)}
        where = {"marker": MARKER, "beside": (RUN_MARKER,)}
        on_main_process(lambda: claim(out, mine, resume=resume, **where))
        both = OneRun(
            *(updates, dataset, config, selection, out),
            *(held_out, collator, resume, progress, name),
        )
        if not (resume and on_main_process((out / MASK).exists)):
            _first_part(both, step)
        mask = LayerMask.load(out / MASK)
        apply_mask(peft_model, mask, closed=selection.closed)
        metrics = train(
            *(peft_model, dataset, config),
            held_out=held_out,
            collator=collator,
            output_dir=out,
            resume=True,
            progress=progress,
            name=name,
            begun=Begun(_FILES, lambda found, costs: _finish(found, costs, mask)),
        )
        on_main_process(lambda: shutil.rmtree(out / SEARCH, ignore_errors=True))
    return metrics, mask


class _StopAt(TrainerCallback):
    """Ends the first part with a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def _first_part(both: OneRun, step: int) -> None:
    """Train all layers, choose, and leave the checkpoint of the switch and the mask."""
    out, updates, search = both.folder, both.updates, both.folder / SEARCH
    args = arguments_of(both.config, search, keep=True)
    signal, costs = updates.signal(), StepMeter(args.device)

    def save(checkpoint: Path) -> None:
        signal.save(checkpoint)
        costs.save(checkpoint)

    log = LogFile(out / "log.jsonl", "train")
    title = f"Training {both.name}, all layers to step {step}"
    own = stage_callbacks(title, log, progress=both.progress, also_save=save)
    callbacks = [costs, _StopAt(step), *own]
    trainer = updates.trainer_class(SignalTrainer)(
        updates.model, args, both.collator, both.dataset, callbacks=callbacks
    )
    trainer.signal = signal
    _measure_before(both, trainer)
    start = resume_point(search, both.resume)
    if start is not None:
        signal.load(start)
        costs.load(start)
    names = None if trainer.is_fsdp_enabled else optimizer_names(trainer)
    costs.begin()
    run(trainer, start)
    began = time.perf_counter()
    mask = _chosen(both, trainer, signal, step)
    took = {
        "steps": step,
        "seconds": sum(costs.times_ms) / 1e3,
        "choosing_seconds": time.perf_counter() - began,
        **costs.measured(),
    }
    mask = mask.with_provenance(took=took)
    before = {name for name, _ in updates.model.named_parameters()}
    apply_mask(updates.model, mask, closed=both.selection.closed)
    dropped = before - {name for name, _ in updates.model.named_parameters()}
    state = updates.state()
    opened = {name for name, p in updates.model.named_parameters() if p.requires_grad}

    def switch() -> None:
        write_switch(
            *(search / f"checkpoint-{step}", out / CHECKPOINTS, names or [], opened, dropped),
            lambda folder: updates.save(folder, state),
        )
        mask.save(out / MASK)

    on_main_process(switch)


def _measure_before(both: OneRun, trainer: Trainer) -> None:
    file, held_out = both.folder / BEFORE_FILE, both.held_out
    if on_main_process(file.exists):
        return
    before = None
    if held_out:
        before = held_out_loss(trainer.model, held_out, both.collator, both.config.batch_size)
    on_main_process(lambda: write_json_atomic(file, {"held_out_loss_before": before}))


def _chosen(both: OneRun, trainer: Trainer, signal: LayerMean, step: int) -> LayerMask:
    """The mask; every process gets that of the main one."""
    args = trainer.args
    own = drawn_batches(
        *(both.dataset, both.collator, args.train_batch_size, args.seed, args.device)
    )
    mask = both.selection.choose(both.updates, signal, own, step)
    fields = on_main_process(
        lambda: (dict(mask.scores), dict(mask.gates), thawed(mask.provenance)),
    )
    return LayerMask(*fields)


def _finish(metrics: dict[str, Any], costs: StepMeter, mask: LayerMask) -> dict[str, Any]:
    """Add the first part to what ``train`` measured of the second."""
    took = thawed(mask.provenance["took"])
    peaks = [took["peak_memory_bytes"], metrics["peak_memory_bytes"]]
    return {
        **metrics,
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "selected": {
            "search": took,
            "seconds": sum(costs.times_ms) / 1e3,
            "peak_memory_bytes": peaks[1],
            "selection": thawed(mask.provenance["selection"]),
        },
    }

"""``SelectLayers``: search and selection in the middle of a training run, as a Trainer callback.

    all layers train  →  score  →  choose  →  close the others in place  →  the same run goes on

Scores cost nothing or little: the gate gradients of the steps so far, or ``path`` on a few batches.
Schedule and order of the data stay what they are.

The optimiser keeps the parameters of closed layers in its groups, without gradient and without
state, so that it updates nothing and holds nothing for them. That is how a checkpoint written after
the switch fits the optimiser that Trainer makes for the whole model when it resumes.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ila.masks.mask import LayerMask
from ila.models.edit import CLOSINGS, apply_mask
from ila.price.choice import Choice
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import GateGradient
from ila.search.in_place import Batch, path_scores, shape_of

SCORINGS = ("gate_gradient", "path")


def switch_step(at: float | int, steps: int) -> int:
    """Return the number of steps in which all layers train.

    Args:
        at: A share of the steps in (0, 1), or their number.
        steps: Steps of the whole run.

    Raises:
        ValueError: If no step is left for either part.

    >>> switch_step(0.25, 80), switch_step(20, 80)
    (20, 20)
    """
    step = max(1, round(at * steps)) if isinstance(at, float) else at
    if not 1 <= step < steps:
        raise ValueError(f"at must leave steps before and after the switch, got {at} of {steps}")
    return step


class SelectLayers(TrainerCallback, ExportableState):
    """Trains all layers for a while, then only those that matter; for any ``transformers.Trainer``.

    ``trainer.add_callback(ila.SelectLayers(at=0.25, top=0.3))`` before ``trainer.train()``; TRL's
    trainers too. Checkpoints hold what it gathers, so that a run resumes before and after the
    switch with the same callback and the same call.

    The gradients of ``gate_gradient`` are those that the optimiser gets, after clipping: a step
    counts as much as it moves.

    Args:
        at: When to switch: a share of the steps, or a number of steps.
        top: Share of layers that stay open; ``ila.price.choice.Choice`` explains this and the next.
        freeze: Share of layers that close.
        budget: What the open layers may cost.
        blocks: Number of last blocks that stay open.
        speed: For a budget of time.
        closed: ``"keep"`` freezes closed layers in place, ``"drop"`` takes their updates away.
        method: ``"gate_gradient"``, for free, or ``"path"`` on ``batches`` of the run's own data.
        batches: Batches that ``path`` looks at.

    Attributes:
        mask: What was selected; None before the switch.

    Raises:
        ValueError: If an argument is out of range. When training begins: if the model has no layer
            to score, several processes train it (``ila train --select-at`` does that), or the
            checkpoint is of another selection.
    """

    def __init__(
        self,
        at: float | int = 0.25,
        *,
        top: float | None = None,
        freeze: float | None = None,
        budget: str | None = None,
        blocks: int | str | None = None,
        speed: str | None = None,
        closed: str = "keep",
        method: str = "gate_gradient",
        batches: int = 12,
    ):
        self.choice = Choice(top, freeze, budget, blocks, speed)
        if isinstance(at, bool) or not (0 < at < 1 if isinstance(at, float) else at >= 1):
            raise ValueError(f"at must be a share in (0, 1) or a number of steps ≥ 1, got {at!r}")
        for name, value, words in (("closed", closed, CLOSINGS), ("method", method, SCORINGS)):
            if value not in words:
                raise ValueError(f"{name} must be one of {words}, got {value!r}")
        self.at, self.closed, self.method, self.batches = at, closed, method, batches
        self.mask: LayerMask | None = None
        self.signal: GateGradient | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: arguments, then running sums or the mask."""
        names = ("at", "closed", "method", "batches")
        arguments = {**self.choice.as_dict(), **{name: getattr(self, name) for name in names}}
        found: dict[str, Any] = {"args": arguments, "attributes": {}}
        if self.mask is not None:
            _, (scores, gates, provenance) = self.mask.__reduce__()
            found["mask"] = {"scores": scores, "gates": gates, "provenance": provenance}
        elif self.signal is not None:
            found["signal"] = self.signal.sums()
        return found

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        _check_alone(args, model)
        self.step, self.mask = switch_step(self.at, state.max_steps), None
        saved = state.stateful_callbacks.setdefault("SelectLayers", {})
        if state.global_step == 0 or not saved:
            saved = {"args": self.state()["args"]}
        if not isinstance(saved, dict) or saved["args"] != self.state()["args"]:
            raise ValueError("the checkpoint was written with another SelectLayers; give that one")
        if "mask" in saved:
            self._apply(LayerMask(**saved["mask"]), model, optimizer)
            return
        if state.global_step > self.step:
            raise ValueError(
                f"the checkpoint is of step {state.global_step}, after the switch at {self.step}, "
                "and was written without SelectLayers"
            )
        updates = AdapterUpdates(model)
        self.signal = GateGradient(updates.layers, updates.adapter)
        if "signal" in saved:
            self.signal.set_sums(saved["signal"])

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.mask is None:
            scaler = getattr(optimizer, "scaler", None)
            scaled = scaler is not None and args.max_grad_norm == 0  # clipping unscales
            self.signal.gather(state.global_step, scaler.get_scale() if scaled else None)

    def on_step_begin(
        self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs
    ):
        if self.mask is not None or state.global_step != self.step:
            return
        updates, shape, scores = AdapterUpdates(model), None, self.signal.mean()
        if self.method == "path" or self.choice.budget is not None:
            batches = _own_batches(train_dataloader, args, self.batches)
            shape = shape_of(updates, batches[0]) if self.choice.budget is not None else None
            scores = path_scores(updates, batches) if self.method == "path" else scores
        provenance = {
            "search": {"config": {"method": self.method}},
            "selection": self.choice.as_dict(),
            "closed": self.closed,
            "step": self.step,
            "folds": self.signal.folds() if self.method == "gate_gradient" else [],
        }
        mask = self.choice.cut(scores, shape).with_provenance(**provenance)
        self._apply(mask, model, optimizer)

    def _apply(self, mask: LayerMask, model: PeftModel, optimizer: Any) -> None:
        before = {p for p in model.parameters() if p.requires_grad}
        apply_mask(model, mask, closed=self.closed)
        for parameter in before - {p for p in model.parameters() if p.requires_grad}:
            optimizer.state.pop(parameter, None)
        self.mask, self.signal = mask, None


def _check_alone(args: TrainingArguments, model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(f"SelectLayers needs a PeftModel, got {type(model).__name__}")
    sharded = any(hasattr(p, "placements") for p in model.parameters())
    if args.world_size > 1 or sharded or getattr(args, "deepspeed", None):
        raise ValueError(
            "SelectLayers closes layers of one process: DDP, FSDP and DeepSpeed have made their "
            "buckets and shards by then; use `ila train --select-at`, which starts them again"
        )


def _own_batches(loader: DataLoader, args: TrainingArguments, count: int) -> list[Batch]:
    """Rows drawn by a seed of their own: the order of the training stays as it is."""
    dataset, draw = loader.dataset, random.Random(args.seed)
    size = args.train_batch_size
    found = []
    for _ in range(count):
        rows = [dataset[draw.randrange(len(dataset))] for _ in range(size)]
        batch = loader.collate_fn(rows)
        found.append({k: v.to(args.device) for k, v in batch.items() if torch.is_tensor(v)})
    return found

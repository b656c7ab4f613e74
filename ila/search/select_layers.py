"""``SelectLayers``: search and selection in the middle of a training run, as a Trainer callback.

    all layers train  →  score  →  choose  →  close the others in place  →  the same run goes on

Scores cost nothing or little: the gate gradients of the steps so far, or ``path`` on a few batches.
Schedule and order of the data stay what they are.

The optimiser keeps the parameters of closed layers in its groups, without gradient and without
state, so that it updates nothing and holds nothing for them. That is how a checkpoint written after
the switch fits the optimiser that Trainer makes for the whole model when it resumes.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.models.edit import apply_mask
from ila.price.choice import Choice
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import GateGradient
from ila.search.selection import Selection, drawn_batches


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
        **how: ``closed``, ``method`` and ``batches`` of ``ila.search.selection.Selection``: how
            layers close (``"keep"`` or ``"drop"``), which scores (``"gate_gradient"`` or
            ``"path"``), and how many batches ``path`` looks at.

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
        **how: Any,
    ):
        self.selection = Selection(Choice(top, freeze, budget, blocks, speed), at, **how)
        self.mask: LayerMask | None = None
        self.signal: GateGradient | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: arguments, then running sums or the mask."""
        found: dict[str, Any] = {"args": self.selection.as_dict(), "attributes": {}}
        if self.mask is not None:
            provenance = thawed(self.mask.provenance)
            scores, gates = dict(self.mask.scores), dict(self.mask.gates)
            found["mask"] = {"scores": scores, "gates": gates, "provenance": provenance}
        elif self.signal is not None:
            found["signal"] = self.signal.sums()
        return found

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        _check_alone(args, model)
        self.step, self.mask = self.selection.step(state.max_steps), None
        mine = self.selection.as_dict()
        saved = state.stateful_callbacks.setdefault("SelectLayers", {})
        if state.global_step == 0 or not saved:
            saved = {"args": mine}
        if not isinstance(saved, dict) or saved["args"] != mine:
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
        loader = train_dataloader
        own = drawn_batches(
            *(loader.dataset, loader.collate_fn, args.train_batch_size, args.seed, args.device)
        )
        mask = self.selection.choose(AdapterUpdates(model), self.signal, own, self.step)
        self._apply(mask, model, optimizer)

    def _apply(self, mask: LayerMask, model: PeftModel, optimizer: Any) -> None:
        before = {p for p in model.parameters() if p.requires_grad}
        apply_mask(model, mask, closed=self.selection.closed)
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

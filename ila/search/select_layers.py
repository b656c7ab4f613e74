"""``SelectLayers``: search and selection in the middle of a training run, as a Trainer callback.

    all layers train  →  score  →  choose  →  close the others in place  →  the same run continues

Scores cost little: the gate gradients of the past steps, or ``path`` on a few batches. The schedule
and the order of the data do not change.

The optimiser keeps the parameters of closed layers in its groups, without gradient and without
state, so that it neither updates them nor holds memory for them. A checkpoint after the switch thus
fits the optimiser that Trainer makes for the whole model when it resumes.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.masks.objective import LAYERS
from ila.models.adalora import tuner_of
from ila.models.edit import apply_mask
from ila.models.tensors import MaskedTensor, named_layers
from ila.price.choice import Choice
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import GateGradient
from ila.search.selection import Selection, drawn_batches
from ila.training.reducer import reduce_trained, wrappers_of


class SelectLayers(TrainerCallback, ExportableState):
    """Train all layers for a while, then only the selected ones; for any ``transformers.Trainer``.

    Call ``trainer.add_callback(ila.SelectLayers(at=0.25, top=0.3))`` before ``trainer.train()``;
    trainers of TRL work too, and so does DDP. Checkpoints keep the sums or the mask, so that a run
    resumes before and after the switch with the same callback and the same call.

    ``gate_gradient`` reads the gradients after clipping, as the optimiser gets them: a step counts
    as much as it moves.

    Args:
        at: Time of the switch: a share of the steps, or a number of steps.
        top: Share of layers that stay open; for this and the next four see
            ``ila.price.choice.Choice``.
        freeze: Share of layers that close.
        budget: Most that the open layers may cost.
        blocks: Number of last blocks that stay open.
        speed: Rates for a budget of time.
        objective: Worth of a set of layers, ``"layers"`` or ``"blocks"``; see
            ``ila.masks.objective``.
        **how: ``closed``, ``method`` and ``batches`` of ``ila.search.selection.Selection``: the way
            to close layers (``"keep"`` or ``"drop"``), the scores (``"gate_gradient"`` or
            ``"path"``), and the number of batches for ``path``.

    Attributes:
        mask: Selected mask; None before the switch.

    Raises:
        ValueError: If an argument is out of range. When training begins: if the model has no layer
            to score, it is sharded (under FSDP2, ``ila train --select-at`` does), or the
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
        objective: str = LAYERS,
        **how: Any,
    ):
        self.selection = Selection(Choice(top, freeze, budget, blocks, speed, objective), at, **how)
        self.mask: LayerMask | None = None
        self.signal: GateGradient | None = None

    def state(self) -> dict[str, Any]:
        """Return the content for a checkpoint: arguments, then running sums or the mask."""
        kept: dict[str, Any] = {"args": self.selection.as_dict(), "attributes": {}}
        if self.mask is not None:
            provenance = thawed(self.mask.provenance)
            scores, gates = dict(self.mask.scores), dict(self.mask.gates)
            kept["mask"] = {"scores": scores, "gates": gates, "provenance": provenance}
        elif self.signal is not None:
            kept["signal"] = self.signal.sums()
        return kept

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Start to gather, or apply the mask of the checkpoint."""
        _check_model(args, model)
        if self.selection.closed == "drop":
            _refuse_tensors(model)
        self.step, self.mask = self.selection.step(state.max_steps), None
        mine = self.selection.as_dict()
        saved = state.stateful_callbacks.setdefault("SelectLayers", {})
        if state.global_step == 0 or not saved:
            saved = {"args": mine}
        if not isinstance(saved, dict) or saved["args"] != mine:
            raise ValueError("the checkpoint was written with another SelectLayers; give that one")
        if "mask" in saved:
            self._apply(LayerMask(**saved["mask"]), args, model, optimizer)
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

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Gather the gradients of a step before the switch."""
        if self.mask is None:
            scaler = getattr(optimizer, "scaler", None)
            scaled = scaler is not None and args.max_grad_norm == 0  # clipping unscales
            self.signal.gather(state.global_step, scaler.get_scale() if scaled else None)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: object,
    ) -> None:
        """Score, choose and close at the step of the switch."""
        if self.mask is not None or state.global_step != self.step:
            return
        own = drawn_batches(
            train_dataloader.dataset,
            train_dataloader.collate_fn,
            args.train_batch_size,
            args.seed,
            args.device,
        )
        mask = self.selection.choose(AdapterUpdates(model), self.signal, own, self.step)
        self._apply(mask, args, model, optimizer)

    def _apply(
        self, mask: LayerMask, args: TrainingArguments, model: PeftModel, optimizer: Optimizer
    ) -> None:
        before = {p for p in model.parameters() if p.requires_grad}
        apply_mask(model, mask, closed=self.selection.closed)
        for parameter in before - {p for p in model.parameters() if p.requires_grad}:
            optimizer.state.pop(parameter, None)
        if args.world_size > 1:
            reduce_trained(model)
        self.mask, self.signal = mask, None


def _refuse_tensors(model: nn.Module) -> None:
    """Refuse to drop tensors of one module: a run that resumes loads before it closes them."""
    tensors = [name for name, m in named_layers(model, MaskedTensor).items() if _is_nested(m)]
    if tensors:
        raise ValueError(
            "SelectLayers needs closed='keep' where two tensors of one module have adapters, got "
            f"'drop': the names of their saved weights ({tensors[0]}) depend on which are open, so "
            "no checkpoint of the open ones could be resumed; `ila train --select-at` drops them"
        )


def _is_nested(layer: MaskedTensor) -> bool:
    return isinstance(layer.base_layer, MaskedTensor)


def _check_model(args: TrainingArguments, model: object) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(f"SelectLayers needs a PeftModel, got {type(model).__name__}")
    if tuner_of(model) is not None:
        raise ValueError(
            "SelectLayers needs a LoRA adapter, got AdaLoRA; learn a mask first (ila.learn_mask)"
        )
    sharded = any(hasattr(p, "placements") for p in model.parameters())
    elsewhere = args.world_size > 1 and not wrappers_of(model)
    if sharded or elsewhere or getattr(args, "deepspeed", None):
        raise ValueError(
            "SelectLayers closes layers in one process, and under DDP around the model itself: "
            "a checkpoint of a sharded optimiser (FSDP, DeepSpeed) would not fit the whole model "
            "that Trainer makes when it resumes; under FSDP2 use `ila train --select-at`, which "
            "starts Trainer again for the open layers"
        )

"""``TakeOver``: our layers and a mask in a trainer that another tool makes, as a callback.

Trainer calls it when it is built, before it makes the optimiser: an optimiser that does not exist
yet holds no parameter of a closed layer.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ila.masks.mask import LayerMask
from ila.models.edit import CLOSINGS, apply_mask, convert, masked_layers, single_adapter
from ila.models.lean_head import lean_head as put_lean_head


class TakeOver(TrainerCallback):
    """Convert the LoRA layers of a trainer's model to ours, and apply a mask.

    Give it to a tool that makes model and trainer itself and takes callbacks:
    ``callbacks=[TakeOver("mask.json")]``, or ``[TakeOver(), ila.SelectLayers(at=0.25, top=0.3)]``.

    Args:
        mask: Mask, or its file; None leaves all layers open.
        closed: Way to close the others, ``"drop"`` or ``"keep"``; see ``ila.apply_mask``.
        lean_head: Whether to compute the loss by ``ila.lean_head``; its model returns no logits.

    Raises:
        ValueError: If ``closed`` is another word. At the trainer: if no layer can be converted, or
            the mask is of another model.
    """

    def __init__(
        self,
        mask: LayerMask | str | Path | None = None,
        closed: str = "drop",
        lean_head: bool = False,
    ):
        if closed not in CLOSINGS:
            raise ValueError(f"closed must be one of {CLOSINGS}, got {closed!r}")
        read = mask is None or isinstance(mask, LayerMask)
        self.mask = mask if read else LayerMask.load(mask)
        self.closed, self.lean_head = closed, lean_head

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Prepare the model of a trainer that has just been built."""
        self.prepare(model, optimizer)

    def prepare(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Convert a model, once, and apply the mask.

        Args:
            model: A ``PeftModel`` with one active adapter.
            optimizer: Optimiser that forgets the parameters of closed layers, if there is one.
        """
        if not masked_layers(model, single_adapter(model, None)):
            convert(model)
        if self.mask is not None:
            apply_mask(model, self.mask, closed=self.closed, optimizer=optimizer)
        if self.lean_head:
            put_lean_head(model)

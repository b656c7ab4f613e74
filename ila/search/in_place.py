"""Score, choose and close the layers of a model between two steps of its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from peft import PeftModel
from torch import Tensor, nn

from ila.data.contracts import IGNORED, Batch
from ila.masks.mask import LayerMask
from ila.models.edit import apply_mask
from ila.models.lean_head import leaning
from ila.models.tensors import record_of_tensors
from ila.price.choice import Choice
from ila.price.shapes import Shape
from ila.search.adapter_updates import AdapterUpdates
from ila.search.gate_gradients import PathGradient
from ila.search.stage2 import PATH_POINTS


def select_layers(
    model: PeftModel,
    batches: Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    closed: str = "keep",
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    **choice: float | int | str | None,
) -> LayerMask:
    """Score the layers of a model on a few batches and close the rest; for a loop of your own.

    Call it between two steps, after ``optimizer.zero_grad()``. It scores by method ``path``: −dL/dγ
    of each layer, averaged over gates at five points. It keeps the random state of torch.

    Args:
        model: Model of ``ila.attach`` or ``ila.convert``, every layer open.
        batches: Batches on the model's device; 10 to 15 score well.
        optimizer: Optimiser that forgets the parameters and the state of closed layers.
        closed: ``"keep"`` freezes closed layers in place, ``"drop"`` takes their updates away; see
            ``ila.apply_mask``.
        loss: (model, batch) -> loss; by default ``model(**batch).loss``.
        **choice: One of ``top``, ``freeze``, ``budget`` and ``blocks``; see
            ``ila.price.choice.Choice``.

    Returns:
        The applied mask.

    Raises:
        ValueError: If not exactly one choice is given, a layer is closed or cannot be scored, or
            there are too few batches.
    """
    chosen, batches = Choice(**choice), list(batches)
    updates = AdapterUpdates(model)
    scores = path_scores(updates, batches, loss)
    shape = shape_of(updates, batches[0]) if chosen.budget is not None else None
    mask = chosen.cut(scores, shape).with_provenance(
        search={"config": {"method": "path"}},
        selection=chosen.as_dict(),
        closed=closed,
        **record_of_tensors(updates.layers),
    )
    apply_mask(model, mask, closed=closed, optimizer=optimizer)
    return mask


def path_scores(
    updates: AdapterUpdates,
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> dict[str, float]:
    """Return module name -> −dL/dγ, with gates that walk along ``PATH_POINTS``.

    Afterwards the model is unchanged.

    Raises:
        ValueError: If there are fewer batches than points, or a batch has no labels and there is no
            ``loss``.
    """
    if len(batches) < len(PATH_POINTS):
        raise ValueError(f"batches must be at least {len(PATH_POINTS)}, got {len(batches)}")
    if loss is None and "labels" not in batches[0]:
        raise ValueError(
            f"batches must have labels to be scored by path, got {sorted(batches[0])}; "
            "choose method gate_gradient, or give a loss"
        )
    path = PathGradient(updates.layers, updates.adapter, PATH_POINTS)
    device, training = path.device, updates.model.training
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.enable_grad(),
        updates.scored(0.0),
        leaning(updates.model) if loss is None else nullcontext(),
    ):
        torch.manual_seed(0)  # dropout: a resumed run scores as one that was not broken off
        updates.model.train()
        for step, batch in enumerate(batches):
            path.set_gates(step)
            value = updates.model(**batch).loss if loss is None else loss(updates.model, batch)
            value.backward()
            path.gather(step)
            for layer in updates.layers.values():
                layer.lora_S[updates.adapter].grad = None
    updates.model.train(training)
    return path.mean()


def shape_of(updates: AdapterUpdates, batch: Batch) -> Shape:
    """Return the sizes of a model and of a step on such a batch, for budgets."""
    layers, config = updates.layers.values(), updates.model.config
    rows, length = batch["input_ids"].shape
    packing = {"is_loaded_in_4bit": "4bit", "is_loaded_in_8bit": "8bit"}
    base = updates.model.get_base_model()
    return Shape.of(
        config if isinstance(config, Mapping) else config.to_dict(),
        rank=max(layer.r[updates.adapter] for layer in layers),
        rows=rows,
        length=length,
        base_bytes=base.dtype.itemsize,
        dropout=any(
            isinstance(layer.lora_dropout[updates.adapter], nn.Dropout) for layer in layers
        ),
        load_in=next((how for name, how in packing.items() if getattr(base, name, False)), None),
        answers=_answers(batch),
    )


def _answers(batch: Batch) -> float:
    """Return the share of the tokens that are labels; all of them where a batch has none."""
    counted = (batch["labels"][:, 1:] != IGNORED).sum().item() if "labels" in batch else 0
    return counted / batch["input_ids"].numel() or 1.0

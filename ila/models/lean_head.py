"""``lean_head``: the loss of a causal language model without the logits of its prompts.

A causal language model computes logits for every token and a loss from those whose next token is a
label. With its head frozen, the loss needs hidden states and labels only (``lean_loss``): no logits
of prompts, and never more than a chunk of the others. The model's ``forward`` is shadowed on the
instance (``lean_forward``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ila.models.blocks import AFTER_BLOCKS
from ila.models.lean_families import family_of, logit_map
from ila.models.lean_forward import (
    REPLICATE,
    LeanForward,
    dtype_of,
    is_lean,
    replicate,
    why_plain,
)
from ila.models.lean_paths import path_here

PLAIN = "plain"


class HeadRoute(NamedTuple):
    """Which code computes the loss of a model, and why."""

    path: str
    reason: str


# A method that PEFT calls, by name, on the way to a model without adapters.
_UNLOAD = "unload_and_optionally_merge_module"


def lean_head(model: nn.Module) -> HeadRoute:
    """Let a causal language model compute its loss without logits; the loss is the same number.

    ``outputs.logits`` of a call with labels is None: metrics of ``Trainer`` that read logits need
    the model as it was. ``ila.restore`` and PEFT's ``unload`` and ``merge_and_unload`` undo this.
    A call without labels, or with ``logits_to_keep``, runs the model's own forward.

    Args:
        model: A ``PeftModel`` or a Hugging Face model; changed in place.

    Returns:
        Which code computes the loss as the model stands, and why. It is chosen anew in each
        forward: a head that is trained or adapted later takes the model's own.

    Raises:
        ValueError: If the family of the model is not known, or its forward was replaced.
    """
    target = _causal_model(model)
    if target is None:
        raise ValueError(
            f"model must hold a causal language model of transformers, got {type(model).__name__}"
        )
    if not is_lean(target):
        reason = _why_unknown(target)
        if reason is not None:
            raise ValueError(f"model cannot take a lean head: {reason}")
        target.forward = LeanForward(target)
        setattr(target, REPLICATE, partial(replicate, target))
        setattr(_anchor(target), _UNLOAD, partial(_unload, target))
    return head_route(model)


def plain_head(model: nn.Module) -> bool:
    """Undo ``lean_head``; return whether there was something to undo."""
    target = _causal_model(model)
    if target is None or not is_lean(target):
        return False
    # A wrapper of our forward keeps it, and it now runs the model's own.
    for module in target.model.modules():  # the norm may have moved into a wrapper of PEFT's
        if isinstance(module.__dict__.get(_UNLOAD), partial):
            delattr(module, _UNLOAD)
    delattr(target, REPLICATE)
    if isinstance(target.__dict__.get("forward"), LeanForward):
        del target.forward
    return True


@contextmanager
def leaning(model: nn.Module) -> Iterator[None]:
    """Give a model a lean head, if it can have one, until the ``with`` ends."""
    target = _causal_model(model)
    change = target is not None and not is_lean(target) and _why_unknown(target) is None
    if change:
        lean_head(model)
    try:
        yield
    finally:
        if change:
            plain_head(model)


def head_route(model: nn.Module, gathered: bool = False) -> HeadRoute | None:
    """Say which code computes the loss of a model in training, and why; None without lean head.

    Args:
        model: A ``PeftModel`` or a Hugging Face model.
        gathered: Whether a weight of the head that is sharded now will be whole when it runs.
    """
    target = _causal_model(model)
    if target is None or not is_lean(target):
        return None
    with torch.enable_grad():
        reason = why_plain(target, gathered)
    if reason is not None:
        return HeadRoute(PLAIN, reason)
    weight = target.lm_head.weight
    return HeadRoute(*path_here(dtype_of(weight), weight.device.type, logit_map(target)))


def _causal_model(model: nn.Module) -> PreTrainedModel | None:
    """Find the outermost Hugging Face model in ``model``, if it has a head."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module if hasattr(module, "lm_head") and hasattr(module, "model") else None
    return None


def _why_unknown(model: PreTrainedModel) -> str | None:
    """Say why the loss of a model cannot be told from its class; None if it can."""
    if family_of(model) is None:
        return f"the forward of {type(model).__name__} is not known here"
    if _anchor(model) is None:
        return "its decoder has no last norm"
    if "forward" in model.__dict__:
        return "its forward was replaced on the instance"
    return None


def _anchor(model: PreTrainedModel) -> nn.Module | None:
    """Find the last norm, a leaf; PEFT does not ask the model itself for a way to unload it."""
    named = model.model._modules
    return next((named[name] for name in AFTER_BLOCKS if name in named), None)


def _unload(model: PreTrainedModel, **options: object) -> nn.Module:
    anchor = _anchor(model)
    plain_head(model)
    return anchor

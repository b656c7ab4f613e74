"""``lean_head``: the loss of a causal language model without the logits of its prompts.

A causal language model computes logits for every token and a loss from those whose next token is a
label. With its head frozen, the loss needs hidden states and labels only (``lean_loss``): no logits
of prompts, and never more than a chunk of the others.

The model's ``forward`` is shadowed on the instance. Called with labels it runs the decoder as the
model's own forward does and returns the same loss, and ``logits=None``; called without labels, with
``logits_to_keep`` or an argument that it does not know, it is the model's own forward. ``route``
says which, and why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ila.models.blocks import AFTER_BLOCKS
from ila.models.lean_families import family_of, logit_map, output_class
from ila.models.lean_loss import IGNORED
from ila.models.lean_paths import cross_entropy_sum, path_here
from ila.models.recomputation import has_hooks

PLAIN = "plain"


class HeadRoute(NamedTuple):
    """Which code computes the loss of a model, and why."""

    path: str
    reason: str


# What else the decoder takes; another argument by name may mean something for logits or loss.
_INPUTS = {"cache_position", "output_attentions", "output_hidden_states"}
# Of padding-free batches, as transformers' collator and TRL name them.
_INPUTS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_LOSS = {"shift_labels", "num_items_in_batch"}
_NEUTRAL = {"return_dict": True, "output_router_logits": False}


# A method that PEFT calls, by name, on the way to a model without adapters.
_UNLOAD = "unload_and_optionally_merge_module"


class LeanForward:
    """The forward of a causal language model; lies on the instance, in the place of a method.

    A bound method would not survive a pickle; like one, it has a function and a self, which
    accelerate looks for when it wraps a forward.

    Args:
        model: That model, of one of the families known here.
    """

    def __init__(self, model: PreTrainedModel):
        self.__self__ = model

    @property
    def __func__(self) -> Callable[..., Any]:
        return _forward

    @property
    def __signature__(self) -> inspect.Signature:
        """That of a method: Trainer reads from it which columns the model takes."""
        return inspect.signature(partial(_forward, self.__self__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model's own forward computes, logits left out where there are labels."""
        return _forward(self.__self__, *args, **kwargs)


def _forward(
    self: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> Any:
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    wants_logits = labels is None or not _is_zero(logits_to_keep) or _asks_for_more(kwargs)
    if wants_logits or _why_plain(self) is not None:
        inputs |= {"labels": labels, "logits_to_keep": logits_to_keep}
        return type(self).forward(self, **inputs, **kwargs)
    passed_on = {name: value for name, value in kwargs.items() if name not in _NEUTRAL}
    outputs = self.model(**inputs, **passed_on)
    count = kwargs.get("num_items_in_batch")
    loss = _loss(self, outputs.last_hidden_state, labels, kwargs.get("shift_labels"), count)
    return output_class(self)(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def lean_head(model: nn.Module) -> HeadRoute:
    """Let a causal language model compute its loss without logits; the loss is the same number.

    Whoever reads ``outputs.logits`` of a call with labels finds None: metrics of ``Trainer``, or
    preference losses, want a model as it was. ``ila.restore`` and PEFT's ``unload`` and
    ``merge_and_unload`` give it back.

    Args:
        model: A ``PeftModel`` or a Hugging Face model; changed in place.

    Returns:
        Who computes the loss as the model stands, see ``head_route``. The route is chosen anew in
        each forward: a head that is trained or adapted later takes the model's own code.

    Raises:
        ValueError: If the model is none of a known family, or its forward or loss was replaced.
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
        setattr(_anchor(target), _UNLOAD, partial(_unload, target))
    return head_route(model)


def plain_head(model: nn.Module) -> bool:
    """Undo ``lean_head``; return whether there was something to undo."""
    target = _causal_model(model)
    if target is None or not is_lean(target):
        return False
    # Whoever has wrapped our forward by now keeps it, and finds that it is the model's own.
    delattr(_anchor(target), _UNLOAD)
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
    """Who computes the loss of a model in training, as it stands, and why; None without lean head.

    Args:
        model: A ``PeftModel`` or a Hugging Face model.
        gathered: Whether a weight of the head that is sharded now will be whole when it runs.
    """
    target = _causal_model(model)
    if target is None or not is_lean(target):
        return None
    with torch.enable_grad():
        reason = _why_plain(target, gathered)
    if reason is not None:
        return HeadRoute(PLAIN, reason)
    weight = target.lm_head.weight
    return HeadRoute(*path_here(_dtype(weight), weight.device.type, logit_map(target)))


def _causal_model(model: nn.Module) -> PreTrainedModel | None:
    """The outermost Hugging Face model in ``model``, if it has a head."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module if hasattr(module, "lm_head") and hasattr(module, "model") else None
    return None


def _why_unknown(model: PreTrainedModel) -> str | None:
    """Why the loss of a model cannot be told from its class; None if it can."""
    if family_of(model) is None:
        return f"the forward of {type(model).__name__} is not known here"
    if _anchor(model) is None:
        return "its decoder has no last norm"
    if "forward" in model.__dict__:
        return "its forward was replaced on the instance"
    return None


def _why_plain(model: PreTrainedModel, gathered: bool = False) -> str | None:
    """Why a loss is computed from logits, by the model's own code; None if it is not."""
    if not is_lean(model):
        return "the lean head was undone"
    if getattr(model.config, "return_dict", True) is False:
        return "its configuration asks for tuples"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss function is not transformers' for causal language models"
    head = model.lm_head
    if type(head) is not nn.Linear:
        return f"the head is adapted, or no plain nn.Linear ({type(head).__name__})"
    if has_hooks(head):
        return "the head has hooks or a forward of its own"
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()):
        return "the head is trained"
    if getattr(model.config, "output_router_logits", False):
        return "its loss has a part for the balance of experts"
    if not gathered and type(head.weight) not in (nn.Parameter, FakeTensor):
        return "the head is sharded or packed"
    return "the head is partitioned" if head.weight.numel() == 0 else None


def _is_zero(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether an argument may mean something for logits or loss that is not computed here."""
    return any(
        value is not None
        and name not in _INPUTS
        and name not in _LOSS
        and value is not _NEUTRAL.get(name)
        for name, value in kwargs.items()
    )


def _loss(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Σ / count, count being the labels, or those of all batches of a step."""
    if shift_labels is None:  # tokens < n predict n
        shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    dtype = _dtype(hidden)
    head = model.lm_head
    weight, bias = (p if p is None else p.detach().to(dtype) for p in (head.weight, head.bias))
    total = cross_entropy_sum(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight, bias, targets, logit_map(model)
    )
    if num_items_in_batch is None:
        return _mean(total, (targets != IGNORED).sum())
    if isinstance(num_items_in_batch, Tensor):
        return _mean(total, num_items_in_batch.to(total.device))
    return total / num_items_in_batch


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Σ / count: not a number where nothing counts, with a gradient of 0 as transformers' has."""
    nothing = count == 0
    return torch.where(nothing, total.detach() / count, total / count.masked_fill(nothing, 1))


def _dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a linear layer multiplies a tensor in."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def is_lean(model: PreTrainedModel) -> bool:
    """Whether ``lean_head`` has changed this very model, and nothing has undone it."""
    anchor = _anchor(model)
    return anchor is not None and _UNLOAD in anchor.__dict__


def _anchor(model: PreTrainedModel) -> nn.Module | None:
    """The last norm: a leaf that every family here has; what is on the model itself PEFT skips."""
    named = model.model._modules
    return next((named[name] for name in AFTER_BLOCKS if name in named), None)


def _unload(model: PreTrainedModel, **options: Any) -> nn.Module:
    anchor = _anchor(model)
    plain_head(model)
    return anchor

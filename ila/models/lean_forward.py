"""The forward of a causal language model that computes its loss without the logits of its prompts.

Called with labels it runs the decoder as the model's own forward does, and ``lean_paths`` on its
hidden states; it returns the same loss, and ``logits=None``. Called without labels, with
``logits_to_keep`` or an argument that it does not know, it is the model's own forward, and so it is
where the head is not a frozen ``nn.Linear`` (``why_plain``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ila.data.contracts import IGNORED
from ila.models.blocks import AFTER_BLOCKS
from ila.models.lean_families import logit_map, output_class
from ila.models.lean_paths import cross_entropy_sum
from ila.models.needed_rows import NeededRows, needing
from ila.models.recomputation import has_hooks
from ila.models.transforms import under_transform

# The method by which DataParallel copies a module for each of its devices. Lean models have one of
# their own, and are known by it.
REPLICATE = "_replicate_for_data_parallel"
# Further arguments of the decoder; an unknown one may mean something for logits or loss.
_INPUTS = {"cache_position", "output_attentions", "output_hidden_states"}
# Of padding-free batches, as transformers' collator and TRL name them.
_INPUTS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_LOSS = {"shift_labels", "num_items_in_batch"}
# The field of the keys and values; transformers 5.24 renamed it.
(_CACHE,) = {f.name for f in fields(CausalLMOutputWithPast)} & {"cache", "past_key_values"}
_NEUTRAL = {"return_dict": True, "output_router_logits": False}


class LeanForward:
    """The forward of one model, put on the instance in the place of a method.

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
        """The signature of a method: Trainer reads the names of the columns from it."""
        return inspect.signature(partial(_forward, self.__self__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the computation of the model's own forward; with labels, leave the logits out."""
        return _forward(self.__self__, *args, **kwargs)


def _forward(
    self: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
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
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        **_given(past_key_values=past_key_values, cache=cache),
    }
    wants_logits = labels is None or not _is_zero(logits_to_keep) or _asks_for_more(kwargs)
    if wants_logits or why_plain(self) is not None:
        inputs |= {"labels": labels, "logits_to_keep": logits_to_keep}
        return type(self).forward(self, **inputs, **kwargs)
    passed_on = {name: value for name, value in kwargs.items() if name not in _NEUTRAL}
    targets = _targets(labels, kwargs.get("shift_labels"))
    with needing(_needed(self, attention_mask, targets, kwargs)):
        outputs = self.model(**inputs, **passed_on)
    loss = _loss(self, outputs.last_hidden_state, targets, kwargs.get("num_items_in_batch"))
    return output_class(self)(
        loss=loss,
        **{_CACHE: outputs.get(_CACHE)},
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _given(**values: object) -> dict[str, object]:
    """Return the values that are there; a model knows one of the names of the cache."""
    return {name: value for name, value in values.items() if value is not None}


def why_plain(model: PreTrainedModel, gathered: bool = False) -> str | None:
    """Say why the model's own code computes the loss, from logits; None where it does not.

    Args:
        model: A model with a lean head.
        gathered: Whether a weight of the head that is sharded now will be whole when it runs.
    """
    if not is_lean(model):
        return "the lean head was undone"
    if under_transform():
        return "a transform of torch.func runs here"
    if getattr(model.config, "return_dict", True) is False:
        return "its configuration asks for tuples"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss function is not transformers' for causal language models"
    head = model.lm_head
    if type(head) is not nn.Linear:
        return f"the head is adapted, or no plain nn.Linear ({type(head).__name__})"
    if has_hooks(head):
        return "the head has hooks or a forward of its own"
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if torch.is_grad_enabled() and trained:
        return "the head is trained"
    if getattr(model.config, "output_router_logits", False):
        return "its loss has a part for the balance of experts"
    if not gathered and type(head.weight) not in (nn.Parameter, Tensor, FakeTensor):
        return "the head is sharded or packed"
    return "the head is partitioned" if head.weight.numel() == 0 else None


def _is_zero(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def _asks_for_more(kwargs: dict[str, object]) -> bool:
    """Tell whether an argument may change logits or loss in a way unknown here."""
    return any(
        value is not None
        and name not in _INPUTS
        and name not in _LOSS
        and value is not _NEUTRAL.get(name)
        for name, value in kwargs.items()
    )


def _targets(labels: Tensor, shift_labels: Tensor | None) -> Tensor:
    """Return the token that each position predicts, (B·T,); tokens < n predict n."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return shift_labels.reshape(-1)


def _needed(
    model: PreTrainedModel,
    attention_mask: Tensor | None,
    targets: Tensor,
    kwargs: dict[str, Any],
) -> NeededRows | None:
    """Return the rows that the loss depends on; None for all, or where more is wanted than it."""
    asked = ("output_hidden_states", "output_attentions")
    if any(kwargs.get(name) or getattr(model.config, name, False) for name in asked):
        return None
    if torch.compiler.is_compiling() or isinstance(targets, FakeTensor):
        return None
    # In the families known here attention alone takes a position to others.
    decoder, last = model.model, model.model.layers[-1]
    norms = (decoder._modules[name] for name in AFTER_BLOCKS if name in decoder._modules)
    watched = has_hooks(decoder, last, *norms)
    return NeededRows.of(attention_mask, targets, None if watched else getattr(last, "mlp", None))


def _loss(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Return Σ / count, where count is the labels of the batch, or of all batches of a step."""
    targets = targets.to(hidden.device)
    dtype = dtype_of(hidden)
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
    """Return Σ / count; without labels NaN with a gradient of 0, as in transformers."""
    nothing = count == 0
    return torch.where(nothing, total.detach() / count, total / count.masked_fill(nothing, 1))


def dtype_of(tensor: Tensor) -> torch.dtype:
    """Tell in which dtype a linear layer multiplies a tensor."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def is_lean(model: PreTrainedModel) -> bool:
    """Tell whether ``lean_head`` has changed this very model, and no code has undone it."""
    return REPLICATE in model.__dict__


def replicate(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model for DataParallel, whose copies have the attributes of the original."""
    replica = getattr(type(model), REPLICATE)(model)
    if isinstance(replica.__dict__.get("forward"), LeanForward):
        replica.__dict__["forward"] = LeanForward(replica)
    return replica

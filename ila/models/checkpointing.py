"""Gradient checkpointing that leaves the frozen prefix alone.

The *frozen prefix* of a model is everything below its lowest trainable parameter: the embedding and
the blocks before the first open one. Autograd by itself records nothing there, but checkpointing
makes it: reentrant checkpointing needs an input that requires grad, so transformers and PEFT hook
the embedding to make one, and backward then runs every block again and passes through it. On an
eight-block toy Llama with its last half open, backward took 51.3 GFLOP where 27.5 suffice.

Two methods of the Hugging Face model are shadowed on the instance, so that every caller that turns
checkpointing on (``transformers.Trainer``, TRL, a bare loop; reentrant or not) gets this instead:

- ``_set_gradient_checkpointing`` hands the blocks a ``PrefixAware`` checkpoint function. It looks
  at the parameters of the block in each forward, so it stays right after later freezing and opening
  (a mask, ``modules_to_save``, weights trained in full).
- ``enable_input_require_grads`` takes note, and hooks nothing.

A block runs again along the path of its forward, even if hooks change in between
(``ila.models.recomputation``). Checkpoints that bypass these methods, by torch's own function
around a block or FSDP's wrapper, keep no record: there the hooks of single layers must not change
before backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ila.models.blocks import find_blocks, frozen_blocks, is_trained
from ila.models.recomputation import Recorded

_SHADOWED = ("_set_gradient_checkpointing", "enable_input_require_grads")
_FORCED = "_ila_forced_input_grads"


class PrefixAware:
    """A checkpoint function around another: checkpoints nothing that no gradient passes.

    Args:
        inner: ``torch.utils.checkpoint.checkpoint`` with its options, or a function like it.
    """

    def __init__(self, inner: Callable[..., Any]):
        self.inner = inner

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function(*args)``, by ``inner`` where backward will need the activations."""
        if not torch.is_grad_enabled():
            return function(*args)
        if any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self.inner(_recorded(function), *args)
        block = _module_of(function)
        if block is not None and not is_trained(block):
            return function(*args)
        # The first open block.
        if getattr(self.inner, "keywords", {}).get("use_reentrant") is False:
            return self.inner(_recorded(function), *args)
        # Reentrant checkpointing connects outputs to inputs that require
        # grad, and none does; this one is not part of any formula, so that backward still ends at
        # the lowest open layer instead of crossing the block.
        witness = torch.zeros((), requires_grad=True)
        return self.inner(_recorded(_Witnessed(function)), *args, witness)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    # A compiled block is one graph, forward and recomputation.
    return function if torch.compiler.is_compiling() else Recorded(function)


class _Witnessed:
    """``function`` with one more argument, the last, which its result does not depend on."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        *args, witness = args
        out = self.function(*args)
        if isinstance(out, Tensor) and torch.is_grad_enabled() and not out.requires_grad:
            # Trainable, but unused in this forward (an inactive adapter): reentrant backward
            # refuses a result without a graph. Only a recomputation comes here.
            out = out + witness.to(out)
        return out


def _module_of(function: Callable[..., Any]) -> nn.Module | None:
    """Return the block that ``partial(forward, block, …)`` or ``block.forward`` runs."""
    owner = getattr(function, "args", ())[:1] or (getattr(function, "__self__", None),)
    return owner[0] if isinstance(owner[0], nn.Module) else None


def gradient_checkpointing(
    model: nn.Module, enable: bool = True, *, use_reentrant: bool = False, **options: Any
) -> int:
    """Checkpoint the blocks from the first open one on; the frozen prefix runs as it is.

    For loops of one's own; ``gradient_checkpointing=True`` in ``transformers.Trainer`` and TRL does
    the same on any model that ``attach`` or ``convert`` has seen. Follows the mask: blocks that a
    later ``apply_mask`` opens are checkpointed, those it closes are not.

    Args:
        model: A ``PeftModel`` or any Hugging Face model; it is left in the mode it is in.
            Checkpoints are taken in training mode only.
        enable: False turns checkpointing off.
        use_reentrant: Which of torch's two implementations.
        **options: Further keywords of ``torch.utils.checkpoint.checkpoint``.

    Returns:
        The number of blocks that are checkpointed as the model stands.

    Raises:
        ValueError: If the model has no Hugging Face blocks.
    """
    target, blocks = _checkpointed_model(model), find_blocks(model)
    if target is None or blocks is None:
        raise ValueError(
            "model must hold a transformers model whose blocks are GradientCheckpointingLayer, "
            f"got {type(model).__name__}"
        )
    if not enable:
        _method(target, "disable")()
        return 0
    make_prefix_aware(model)
    _method(target, "enable")({"use_reentrant": use_reentrant, **options})
    return len(blocks.layers) - frozen_blocks(model)


def _method(target: PreTrainedModel, verb: str) -> Callable[..., None]:
    """Return the method by its name of today, or by its older name."""
    name = f"activation_checkpointing_{verb}"
    return getattr(target, name, None) or getattr(target, f"gradient_checkpointing_{verb}")


def make_prefix_aware(model: nn.Module) -> None:
    """Make checkpointing respect the frozen prefix, whether it is on or will be turned on.

    Nothing is changed in a model without Hugging Face blocks, or one that is prefix-aware already.
    """
    target = _checkpointed_model(model)
    if target is None or _FORCED in target.__dict__:
        return
    target.__dict__[_FORCED] = _remove_forced_input_grads(target)
    for module in target.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            module._gradient_checkpointing_func = PrefixAware(function)
    # Module-level functions and not methods: partials survive deepcopy and pickle.
    target._set_gradient_checkpointing = partial(_set_gradient_checkpointing, target)
    target.enable_input_require_grads = partial(_note_forced_input_grads, target)


def undo_prefix_aware(model: nn.Module) -> None:
    """Give a model its own checkpointing back, with the forced input grads that were asked for."""
    target = _checkpointed_model(model)
    if target is None or _FORCED not in target.__dict__:
        return
    for name in _SHADOWED:
        del target.__dict__[name]
    for module in target.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, PrefixAware):
            module._gradient_checkpointing_func = function.inner
    if target.__dict__.pop(_FORCED):
        target.enable_input_require_grads()


def _checkpointed_model(model: nn.Module) -> PreTrainedModel | None:
    """Return the outermost Hugging Face model in ``model``, if it has blocks."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module if find_blocks(module) is not None else None
    return None


def _set_gradient_checkpointing(
    model: PreTrainedModel,
    enable: bool = True,
    gradient_checkpointing_func: Callable[..., Any] = checkpoint,
    **options: Any,
) -> None:
    if enable:
        gradient_checkpointing_func = PrefixAware(gradient_checkpointing_func)
    type(model)._set_gradient_checkpointing(
        model, enable, gradient_checkpointing_func=gradient_checkpointing_func, **options
    )


def _note_forced_input_grads(model: PreTrainedModel) -> None:
    model.__dict__[_FORCED] = True


def _remove_forced_input_grads(model: PreTrainedModel) -> bool:
    """Remove every hook of ``enable_input_require_grads``; return whether there was one.

    Asked twice (by PEFT and by Trainer), transformers forgets the handles of the first time, so its
    own method for this leaves hooks behind. They are known by their code.
    """
    ours = PreTrainedModel.enable_input_require_grads.__code__.co_consts
    found = False
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__code__", None) in ours:
                del module._forward_hooks[key]
                found = True
    return found

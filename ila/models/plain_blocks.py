"""Say which blocks keep the forward of their class, so that their layers compute one by one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ila.models.attention import FusedQkv
from ila.models.blocks import find_blocks
from ila.models.class_swap import Swapped, has_parts, why_plain
from ila.models.mlp import LeanMLP

_LOG = logging.getLogger(__name__)
_said: set[str] = set()


def plain_blocks(model: nn.Module) -> dict[str, str]:
    """Return name -> reason for every attention block and MLP that computes layer by layer.

    That is a module in the repeated blocks of the model with two linear layers or more of its own,
    one of them with an adapter. The reason names its class.
    """
    blocks = find_blocks(model)
    inside = set() if blocks is None else set(blocks.layers.modules())
    return {
        name: _why(module)
        for name, module in model.named_modules()
        if module in inside and not isinstance(module, (Swapped, LoraLayer)) and _has_layers(module)
    }


def by_kind(reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with the number of blocks."""
    return [f"{count} × {reason}" for reason, count in Counter(reasons.values()).items()]


def say_plain_blocks(model: nn.Module) -> None:
    """Log a line for each kind of block that computes layer by layer, once in a process."""
    reasons = {name: why for name, why in plain_blocks(model).items() if why not in _said}
    _said.update(reasons.values())
    for line in by_kind(reasons):
        _LOG.warning(f"Computed layer by layer: {line}")


def _has_layers(module: nn.Module) -> bool:
    children = module._modules.values()
    linears = sum(isinstance(m, LoraLayer) or _is_linear(m) for m in children)
    return linears > 1 and any(isinstance(m, LoraLayer) for m in children)


def _is_linear(module: nn.Module | None) -> bool:
    weight = None if module is None else module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _why(module: nn.Module) -> str:
    label = type(module).__name__
    for kind in (FusedQkv, LeanMLP):
        if has_parts(module, kind):
            reason = why_plain(module, kind) or "its class is not converted (ila.convert)"
            return reason if reason.startswith(label) else f"{label}: {reason}"
    own = [n for n, m in module._modules.items() if isinstance(m, LoraLayer) or _is_linear(m)]
    return f"{label}: its layers are {', '.join(own)}"

"""The blocks of a model, and how many lie below the lowest layer that is trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Modules of a decoder that run after its blocks.
AFTER_BLOCKS = ("norm", "final_layernorm", "ln_f")


class Blocks(NamedTuple):
    """The repeated blocks of a model and the module that runs them one after the other."""

    decoder: nn.Module
    layers: nn.ModuleList


def find_blocks(model: nn.Module) -> Blocks | None:
    """Find the longest list of ``GradientCheckpointingLayer`` in a model; None if it has none."""
    found = [
        Blocks(module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList)
        and len(child)
        and all(isinstance(block, GradientCheckpointingLayer) for block in child)
    ]
    return max(found, key=lambda blocks: len(blocks.layers), default=None)


def frozen_blocks(model: nn.Module) -> int:
    """Count the blocks of the frozen prefix, from the parameters that require grad now.

    Returns:
        Blocks below the lowest trainable parameter: all if nothing is trainable; 0 if the first
        block or the embedding is trained, or if the model has no blocks that could be found.
    """
    blocks = find_blocks(model)
    if blocks is None:
        return 0
    for name, child in blocks.decoder.named_children():
        if child is not blocks.layers and name not in AFTER_BLOCKS and is_trained(child):
            return 0
    if any(p.requires_grad for p in blocks.decoder.parameters(recurse=False)):
        return 0
    for depth, block in enumerate(blocks.layers):
        if is_trained(block):
            return depth
    return len(blocks.layers)


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of a module requires grad."""
    return any(p.requires_grad for p in module.parameters())

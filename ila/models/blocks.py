"""The blocks of a model, and how many lie below the lowest layer that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# Modules of a decoder, and of the model around it, that run after its blocks.
AFTER_BLOCKS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "v_head", "dropout")


class Blocks(NamedTuple):
    """The repeated blocks of a model and the module that runs them one after the other."""

    decoder: nn.Module
    layers: nn.ModuleList


def find_blocks(model: nn.Module) -> Blocks | None:
    """Find the blocks that a model's text goes through; None if it has none.

    A model with towers for pictures or sound has several lists of ``GradientCheckpointingLayer``,
    one with an encoder two. The one that counts runs last: that of ``get_decoder()``, else of the
    module that holds the embedding of the tokens, else the longest.
    """
    found = [
        Blocks(module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList)
        and len(child)
        and all(isinstance(block, GradientCheckpointingLayer) for block in child)
    ]
    if len(found) > 1:
        last = _decoder_of(model)
        inside = set() if last is None else set(last.modules())
        found = [blocks for blocks in found if blocks.decoder in inside] or found
    if len(found) > 1:
        embeddings = _embeddings_of(model)
        reads = [b for b in found if embeddings in b.decoder.children()]
        found = reads or found
    return max(found, key=lambda blocks: len(blocks.layers), default=None)


def _outermost(model: nn.Module) -> PreTrainedModel | None:
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def _decoder_of(model: nn.Module) -> nn.Module | None:
    outermost = _outermost(model)
    decoder = None if outermost is None else outermost.get_decoder()
    return None if decoder is outermost else decoder


def _embeddings_of(model: nn.Module) -> nn.Module | None:
    outermost = _outermost(model)
    return None if outermost is None else outermost.get_input_embeddings()


def frozen_blocks(model: nn.Module) -> int:
    """Count the blocks of the frozen prefix, from the parameters that require grad now.

    Returns:
        Blocks below the lowest trainable parameter: all if nothing is trainable; 0 if the first
        block is trained, or the embedding, or a tower whose output comes in beside it, or if the
        model has no blocks that could be found.
    """
    blocks = find_blocks(model)
    if blocks is None:
        return 0
    if below_is_trained(model, blocks):
        return 0
    for depth, block in enumerate(blocks.layers):
        if is_trained(block):
            return depth
    return len(blocks.layers)


def below_is_trained(model: nn.Module, blocks: Blocks) -> bool:
    """Tell, as far as possible, whether the first block reads the output of a trained module."""
    if any(p.requires_grad for p in blocks.decoder.parameters(recurse=False)):
        return True
    return any(is_trained(module) for module in _before(model, blocks))


def _before(model: nn.Module, blocks: Blocks) -> Iterator[nn.Module]:
    """Modules that may run before the blocks: all around them but norms and heads."""
    around, last = model, (*AFTER_BLOCKS, *HEADS)
    while around is not blocks.layers:
        inner = None
        for name, child in around.named_children():
            if inner is None and any(module is blocks.layers for module in child.modules()):
                inner = child
            elif name not in last:
                yield child
        around = inner


def is_trained(module: nn.Module) -> bool:
    """Tell whether any parameter of a module requires grad."""
    return any(p.requires_grad for p in module.parameters())

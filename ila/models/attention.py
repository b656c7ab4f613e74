"""``FusedQkv``: an attention block whose q_proj, k_proj and v_proj compute as one op.

A block stays what it is, with its parameters, names and hooks, and its forward is transformers'
own: only its class changes, to a subclass of its own, and back (``fuse_qkv``, ``unfuse_qkv``).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention

from ila.models.class_swap import Swapped, swap, swap_back
from ila.models.shared_input import sharing

QKV = ("q_proj", "k_proj", "v_proj")


class FusedQkv(Swapped):
    """An attention block whose q, k and v share their x; a base of the classes below.

    Each names the forward that it runs: one that a hook has bound stays callable when the block is
    plain again.
    """


class FusedQkvLlamaAttention(FusedQkv, LlamaAttention):
    """``LlamaAttention`` with q, k and v as one op."""

    plain_class = LlamaAttention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the plain class computes, by its own forward."""
        with sharing(self, QKV):
            return LlamaAttention.forward(self, *args, **kwargs)


class FusedQkvMistralAttention(FusedQkv, MistralAttention):
    """``MistralAttention`` with q, k and v as one op."""

    plain_class = MistralAttention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the plain class computes, by its own forward."""
        with sharing(self, QKV):
            return MistralAttention.forward(self, *args, **kwargs)


_FUSED_CLASSES = {
    LlamaAttention: FusedQkvLlamaAttention,
    MistralAttention: FusedQkvMistralAttention,
}


def fuse_qkv(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Change the class of every attention block of Llama and Mistral to its subclass.

    Returns:
        The names of the blocks changed, and name -> reason of those left: every other module that
        has q_proj, k_proj and v_proj.
    """
    return swap(model, _FUSED_CLASSES, QKV, "attention block")


def unfuse_qkv(model: nn.Module) -> list[str]:
    """Undo ``fuse_qkv``; return the names of the blocks changed back."""
    return swap_back(model, FusedQkv)

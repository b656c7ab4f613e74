"""``FusedQkv``: an attention block whose q_proj, k_proj and v_proj compute as one op.

A block keeps its parameters, names and hooks, and runs transformers' own forward. Only its class
changes, to a subclass, and back (``fuse_qkv``, ``unfuse_qkv``).
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention

from ila.masks.names import QKV
from ila.models.class_swap import Swapped, swap, swap_back
from ila.models.shared_input import sharing


class FusedQkv(Swapped):
    """An attention block whose q, k and v share their x; a base of the classes below.

    Each class names the forward that it runs: a hook may keep that forward, and it must stay
    callable after the block is plain again.
    """


class FusedQkvLlamaAttention(FusedQkv, LlamaAttention):
    """``LlamaAttention`` with q, k and v as one op."""

    plain_class = LlamaAttention

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Run the forward of the plain class with q, k and v as one op."""
        with sharing(self, QKV):
            return LlamaAttention.forward(self, *args, **kwargs)


class FusedQkvMistralAttention(FusedQkv, MistralAttention):
    """``MistralAttention`` with q, k and v as one op."""

    plain_class = MistralAttention

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Run the forward of the plain class with q, k and v as one op."""
        with sharing(self, QKV):
            return MistralAttention.forward(self, *args, **kwargs)


_FUSED_CLASSES = {
    LlamaAttention: FusedQkvLlamaAttention,
    MistralAttention: FusedQkvMistralAttention,
}


def fuse_qkv(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Change the class of every attention block of Llama and Mistral to its subclass.

    Returns:
        The names of the changed blocks, and name -> reason for every other module that has q_proj,
        k_proj and v_proj.
    """
    return swap(model, _FUSED_CLASSES, QKV, "attention block")


def unfuse_qkv(model: nn.Module) -> list[str]:
    """Undo ``fuse_qkv``; return the names of the blocks changed back."""
    return swap_back(model, FusedQkv)

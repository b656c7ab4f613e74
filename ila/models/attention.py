"""``FusedQkv``: an attention block whose q_proj, k_proj and v_proj compute as one op.

A block keeps its parameters, names and hooks, and runs its own forward, whichever class it has.
Only its class changes, to a subclass, and back (``fuse_qkv``, ``unfuse_qkv``).

A class takes part if its forward calls the three on one x, in every run, as its source says. Were
that wrong, nothing but time would be lost: each result is handed out for the very x that it was
computed from, unchanged and in the same modes of torch (``ila.models.shared_input``).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ila.masks.names import QKV
from ila.models.class_swap import Swapped, swap, swap_back
from ila.models.same_code import why_not_one_x
from ila.models.shared_input import sharing


class FusedQkv(Swapped):
    """An attention block whose q, k and v share their x."""

    parts = QKV
    prefix = "FusedQkv"

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        return why_not_one_x(type(module), QKV)

    @staticmethod
    def forward_over(plain: type[nn.Module]) -> Callable[..., object]:
        def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
            """Run the forward of the plain class with q, k and v as one op."""
            with sharing(self, QKV):
                return plain.forward(self, *args, **kwargs)

        return forward


def fuse_qkv(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Change the class of every attention block that calls q, k and v on one x.

    Returns:
        The names of the changed blocks, and name -> reason for every other module that has q_proj,
        k_proj and v_proj.
    """
    return swap(model, FusedQkv)


def unfuse_qkv(model: nn.Module) -> list[str]:
    """Undo ``fuse_qkv``; return the names of the blocks changed back."""
    return swap_back(model, FusedQkv)

"""``LeanMLP``: a SwiGLU block that keeps the outputs of gate_proj and up_proj, and no more.

    y = down_proj(h)        h = silu(gate_proj(x)) ⊙ up_proj(x)

Plain autograd keeps silu(gate_proj(x)) as well, and a LoRA adapter on down_proj keeps h: at
Llama-2-7B's shapes and 4096 tokens, 5.4 GiB of 21.5 GiB. Both are recomputed in backward instead.

A block keeps its parameters, names and hooks: only its class changes, to a subclass, and back
(``make_lean``, ``make_plain``). ``forward`` calls the submodules of the plain class in the same
order and gives the same bits, except for the rounding of ``shared_input``. Code that must see h (an
adapter of down_proj on PEFT's own path, a hook there) sees it; ``route`` says so.

It is on for memory's sake: on a busy 2-core CPU a step of SmolLM2-135M (bf16, 4×256 tokens, gate
and up apart) took 1.04 times the CPU time of the plain block's [0.99–1.08]. ``make_plain`` turns
both off.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP

from ila.masks.names import GATE_UP
from ila.models.class_swap import Swapped, has_own_forward, swap, swap_back, swapped
from ila.models.layer import PEFT, MaskedLoraLayer, Recipe
from ila.models.recomputation import Seen, has_hooks
from ila.models.shared_input import sharing
from ila.models.transforms import under_transform
from ila_kernels import swiglu_product

LEAN, KEEPS_H, PLAIN = "lean", "keeps h", "plain"

_PROJECTIONS = (*GATE_UP, "down_proj")
# transformers' table gave torch's class before it had its own.
_SILU = (type(ACT2FN["silu"]), nn.SiLU)


class MlpRoute(NamedTuple):
    """Tensors that a SwiGLU block keeps for backward beside its input, and the reason."""

    path: str
    reason: str


class LeanMLP(Swapped):
    """The forward of a SwiGLU block with recomputation; a base of the classes below.

    Shapes: x (..., K) -> y (..., K), as the plain class.
    """

    def route(self, gathered: bool = False) -> MlpRoute:
        """Return the tensors that this block keeps for backward now, and the reason.

        Args:
            gathered: Whether the weights of down_proj, sharded now, will be whole when it runs.
        """
        reason = "its forward was replaced" if has_own_forward(self) else None
        reason = reason or _why_not_silu(self)
        if reason is not None:
            return MlpRoute(PLAIN, reason)
        down = self.down_proj
        path, why, adapter = down.route() if isinstance(down, MaskedLoraLayer) else (None,) * 3
        if path == PEFT and not gathered:
            return MlpRoute(KEEPS_H, f"down_proj takes PEFT's forward: {why}")
        if (gathered or adapter is not None) and not _takes_recipe(down):
            return MlpRoute(KEEPS_H, "down_proj has hooks, which may change its input")
        return MlpRoute(LEAN, "gate and up")

    def forward(self, x: Tensor) -> Tensor:
        """Run the computation of the plain class."""
        if _why_not_silu(self) is not None or under_transform():
            return super().forward(x)
        with sharing(self, GATE_UP):
            pre, up = self.gate_proj(x), self.up_proj(x)
        down = self.down_proj
        if pre.dtype != up.dtype:  # an adapter of another dtype merged into one of them
            return down(self.act_fn(pre) * up)
        h = swiglu_product(pre, up)
        # If `pre` wants no gradient, no other code keeps `up`, and h is smaller to keep.
        if pre.requires_grad and _takes_recipe(down):
            return down(h, swiglu=Recipe(Seen(h), pre, up))
        return down(h)


class LeanLlamaMLP(LeanMLP, LlamaMLP):
    """``LlamaMLP`` that keeps less for backward."""

    plain_class = LlamaMLP


class LeanMistralMLP(LeanMLP, MistralMLP):
    """``MistralMLP`` that keeps less for backward."""

    plain_class = MistralMLP


_LEAN_CLASSES = {LlamaMLP: LeanLlamaMLP, MistralMLP: LeanMistralMLP}


def make_lean(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Change the class of every SwiGLU block of Llama and Mistral to its lean subclass.

    Returns:
        The names of the blocks changed, and name -> reason of those left: every other module that
        has gate_proj, up_proj and down_proj.
    """
    return swap(model, _LEAN_CLASSES, _PROJECTIONS, "SwiGLU block", _why_not_silu)


def make_plain(model: nn.Module) -> list[str]:
    """Undo ``make_lean``; return the names of the blocks changed back."""
    return swap_back(model, LeanMLP)


def lean_mlps(model: nn.Module) -> dict[str, LeanMLP]:
    """Module name -> block, for every block that ``make_lean`` changed."""
    return swapped(model, LeanMLP)


def _why_not_silu(block: nn.Module) -> str | None:
    act_fn = block.act_fn
    if type(act_fn) not in _SILU or getattr(act_fn, "inplace", False):
        return f"its act_fn is {type(act_fn).__name__}, not SiLU"
    return "its act_fn has hooks or a forward of its own" if has_hooks(act_fn) else None


def _takes_recipe(down: nn.Module) -> bool:
    """Tell whether down_proj may recompute its input: ours, and no hook of its own sees that."""
    return isinstance(down, MaskedLoraLayer) and not has_hooks(down)

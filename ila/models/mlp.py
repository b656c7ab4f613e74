"""``LeanMLP``: a gated MLP that keeps the outputs of gate_proj and up_proj, and no more.

    y = down_proj(h)        h = f(gate_proj(x)) ⊙ up_proj(x)        f: silu, gelu, gelu by tanh

Plain autograd keeps f(gate_proj(x)) as well, and a LoRA adapter on down_proj keeps h: at
Llama-2-7B's shapes and 4096 tokens, 5.4 GiB of 21.5 GiB. Both are recomputed in backward instead.

A class takes part if its forward compiles to the code of the line above (``_plain``), and if the
two agree to the bit, results and gradients, on a small input in fp64 (``ila.models.mlp_probe``
runs once for each class). A block keeps its parameters, names and hooks: only its class changes, to
a subclass, and back (``make_lean``, ``make_plain``). ``forward`` calls the submodules of the plain
class in the same order and gives the same bits, except for the rounding of ``shared_input``. Code
that must see h (an adapter of down_proj on PEFT's own path, a hook there) sees it; ``route`` says
so.

While only the loss of a batch is wanted, padding is left out, and in the last block all but the
answers (``ila.models.needed_rows``).

It is on for memory's sake: on a busy 2-core CPU a step of SmolLM2-135M (bf16, 4×256 tokens, gate
and up apart) took 1.04 times the CPU time of the plain block's [0.99–1.08]. ``make_plain`` turns
both off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ila.masks.names import GATE_UP
from ila.models.class_swap import Swapped, has_own_forward, subclass, swap, swap_back, swapped
from ila.models.layer import PEFT, MaskedLoraLayer, Recipe
from ila.models.mlp_probe import same_numbers
from ila.models.needed_rows import needed_rows, on_rows
from ila.models.recomputation import Seen, has_hooks
from ila.models.same_code import same_code
from ila.models.shared_input import sharing
from ila.models.transforms import under_transform
from ila_kernels import swiglu_product

LEAN, KEEPS_H, PLAIN = "lean", "keeps h", "plain"

# transformers' table gave torch's class before it had its own.
_SILU = (type(ACT2FN["silu"]), nn.SiLU)
_GELU, _GELU_TANH = type(ACT2FN["gelu"]), type(ACT2FN["gelu_pytorch_tanh"])


class MlpRoute(NamedTuple):
    """Tensors that a gated MLP keeps for backward beside its input, and the reason."""

    path: str
    reason: str


class LeanMLP(Swapped):
    """A gated MLP with recomputation.

    Shapes: x (..., K) -> y (..., K), as the plain class.
    """

    parts = (*GATE_UP, "down_proj")
    prefix = "Lean"

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        kind = type(module)
        if not same_code(kind.forward, _plain):
            return f"{kind.__name__}.forward is not down_proj(act_fn(gate_proj(x)) * up_proj(x))"
        reason = _why_no_activation(module)
        if reason is None and not same_numbers(kind, subclass(LeanMLP, kind), module.act_fn):
            return f"{kind.__name__} computes other numbers than the lean form on a small input"
        return reason

    @staticmethod
    def forward_over(plain: type[nn.Module]) -> Callable[..., object]:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            """Run the computation of the plain class."""
            activation = activation_of(self)
            if activation is None or under_transform():
                return plain.forward(self, x)
            rows = needed_rows(self, x)
            if rows is None or has_hooks(self, *(self._modules[name] for name in LeanMLP.parts)):
                return _lean(self, x, activation)
            return on_rows(x, rows, lambda part: _lean(self, part, activation))

        return forward

    def route(self, gathered: bool = False) -> MlpRoute:
        """Return the tensors that this block keeps for backward now, and the reason.

        Args:
            gathered: Whether the weights of down_proj, sharded now, will be whole when it runs.
        """
        reason = "its forward was replaced" if has_own_forward(self) else None
        reason = reason or _why_no_activation(self)
        if reason is not None:
            return MlpRoute(PLAIN, reason)
        down = self.down_proj
        path, why, adapter = down.route() if isinstance(down, MaskedLoraLayer) else (None,) * 3
        if path == PEFT and not gathered:
            return MlpRoute(KEEPS_H, f"down_proj takes PEFT's forward: {why}")
        if (gathered or adapter is not None) and not _takes_recipe(down):
            return MlpRoute(KEEPS_H, "down_proj has hooks, which may change its input")
        return MlpRoute(LEAN, "gate and up")


def _plain(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _lean(block: nn.Module, x: Tensor, activation: str) -> Tensor:
    with sharing(block, GATE_UP):
        pre, up = block.gate_proj(x), block.up_proj(x)
    down = block.down_proj
    if pre.dtype != up.dtype:  # an adapter of another dtype merged into one of them
        return down(block.act_fn(pre) * up)
    h = swiglu_product(pre, up, activation)
    # If `pre` wants no gradient, no other code keeps `up`, and h is smaller to keep.
    if pre.requires_grad and _takes_recipe(down):
        return down(h, swiglu=Recipe(Seen(h), pre, up, activation))
    return down(h)


def make_lean(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Change the class of every gated MLP whose forward is known to its lean subclass.

    Returns:
        The names of the blocks changed, and name -> reason of those left: every other module that
        has gate_proj, up_proj and down_proj.
    """
    return swap(model, LeanMLP)


def make_plain(model: nn.Module) -> list[str]:
    """Undo ``make_lean``; return the names of the blocks changed back."""
    return swap_back(model, LeanMLP)


def lean_mlps(model: nn.Module) -> dict[str, LeanMLP]:
    """Module name -> block, for every block that ``make_lean`` changed."""
    return swapped(model, LeanMLP)


def activation_of(block: nn.Module) -> str | None:
    """Name the activation of a block as ``swiglu_product`` does; None if only a call computes it.

    Python code of the same formula is another activation: it rounds elsewhere.
    """
    act_fn = block.act_fn
    kind, name = type(act_fn), None
    if kind in _SILU:
        name = None if getattr(act_fn, "inplace", False) else "silu"
    elif kind is nn.GELU:
        name = "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    elif kind is _GELU:
        name = "gelu" if act_fn.act is F.gelu else None
    elif kind is _GELU_TANH:
        name = "gelu_tanh" if isinstance(act_fn.act, functools.partial) else None
    return None if name is None or has_hooks(act_fn) else name


def _why_no_activation(block: nn.Module) -> str | None:
    if activation_of(block) is not None:
        return None
    if has_hooks(block.act_fn):
        return "its act_fn has hooks or a forward of its own"
    return f"its act_fn is {type(block.act_fn).__name__}, neither torch's silu nor its gelu"


def _takes_recipe(down: nn.Module) -> bool:
    """Tell whether down_proj may recompute its input: ours, and no hook of its own sees that."""
    return isinstance(down, MaskedLoraLayer) and not has_hooks(down)

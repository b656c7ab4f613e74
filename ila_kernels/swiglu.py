"""h = f(pre) ⊙ up, keeping pre and up for backward and neither f(pre) nor h.

    SwiGLU: f = silu      σ = sigmoid(pre)    f(pre) = pre σ    f'(pre) = σ (1 + pre (1 − σ))
    GeGLU:  f = gelu, exact or by tanh, as torch computes it
    dup = dh ⊙ f(pre)     dpre = dh ⊙ up ⊙ f'(pre)

pre and up (M, F) are the outputs of gate_proj and up_proj. Plain autograd keeps three tensors of
M·F elements here, pre for f and f(pre), up for the product, and down_proj's dA keeps a
fourth, h. Two of the four are a pointwise function of the other two: recomputing them costs a few
operations an element, beside the 4·K a linear layer spends on it. Down_proj's part of that is
``masked_lora_linear(h, …, swiglu=(pre, up))``.

Every product is rounded where plain autograd rounds it: results and gradients have the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ila_kernels.validate import check_swiglu

# Activation -> how torch's gelu approximates; "silu" is not among them.
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def activated(pre: Tensor, activation: str) -> Tensor:
    """f(pre)."""
    return F.silu(pre) if activation == "silu" else F.gelu(pre, approximate=_GELU[activation])


def product(pre: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(pre) ⊙ up, of equal shapes and dtypes, with one tensor written."""
    return activated(pre, activation).mul_(up)


def input_grads(
    dh: Tensor,
    acted: Tensor,
    pre: Tensor,
    up: Tensor,
    needs_pre: bool,
    needs_up: bool,
    activation: str,
) -> tuple[Tensor | None, Tensor | None]:
    """dpre and dup, ``None`` where unwanted; all (M, F). dup is written over f(pre).

    Not a new tensor for every step: at (1024, 576) x (576, 1536) in bf16 on one CPU core, forward
    and backward of a block then took 1.15 to 1.21 times plain autograd's time, so 1.00 to 1.05.
    """
    dpre = None
    if needs_pre:
        dpre, aten = dh * up, torch.ops.aten
        if activation == "silu":
            aten.silu_backward.grad_input(dpre, pre, grad_input=dpre)
        else:
            how = _GELU[activation]
            aten.gelu_backward.grad_input(dpre, pre, approximate=how, grad_input=dpre)
    return dpre, acted.mul_(dh) if needs_up else None


class SwigluFunction(torch.autograd.Function):
    """The product as an autograd function; twice differentiable."""

    @staticmethod
    def forward(ctx, pre, up, activation):
        """Keep pre, and up where dpre will read it."""
        ctx.activation = activation
        ctx.save_for_backward(pre, up if ctx.needs_input_grad[0] else None)
        return product(pre, up, activation)

    @staticmethod
    def backward(ctx, dh):
        """Return dpre and dup, ``None`` where it is not wanted."""
        pre, up = ctx.saved_tensors
        needs_pre, needs_up, _ = ctx.needs_input_grad
        acted, no_activation = activated(pre, ctx.activation), None
        if torch.is_grad_enabled():  # create_graph
            dpre = _differentiable(dh * up, pre, ctx.activation) if needs_pre else None
            return dpre, dh * acted if needs_up else None, no_activation
        grads = input_grads(dh, acted, pre, up, needs_pre, needs_up, ctx.activation)
        return (*grads, no_activation)


def _differentiable(dy: Tensor, pre: Tensor, activation: str) -> Tensor:
    """dy ⊙ f'(pre), with a derivative: torch's silu_backward has none."""
    if activation == "silu":
        sigma = torch.sigmoid(pre)
        return dy * (sigma * (1 + pre * (1 - sigma)))
    return torch.ops.aten.gelu_backward(dy, pre, approximate=_GELU[activation])


def swiglu_product(pre: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Multiply f(pre) by up, keeping nothing for backward but these two.

        h = f(pre) ⊙ up        f: silu, gelu, or gelu by tanh

    Under ``torch.compile`` it is the plain expression: the compiler decides which tensors to keep.

    Args:
        pre: Output of gate_proj, any shape, floating dtype. Differentiable.
        up: Output of up_proj, shape and dtype of ``pre``. Differentiable.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"`` (``gelu(…, approximate="tanh")``).

    Returns:
        h, shape and dtype of ``pre``; bit for bit ``F.silu(pre) * up``, or with ``F.gelu``.

    Raises:
        TypeError: If an argument is no floating tensor, or the dtypes differ.
        ValueError: If the shapes differ, or ``activation`` is another word.

    >>> swiglu_product(torch.tensor([0.0, 2.0]), torch.tensor([5.0, 1.0]))
    tensor([0.0000, 1.7616])
    """
    check_swiglu(pre, up, activation)
    if torch.compiler.is_compiling():
        return activated(pre, activation) * up
    if not (torch.is_grad_enabled() and (pre.requires_grad or up.requires_grad)):
        return product(pre, up, activation)
    return SwigluFunction.apply(pre, up, activation)

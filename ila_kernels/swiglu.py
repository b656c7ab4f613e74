"""h = silu(pre) ⊙ up, keeping pre and up for backward and neither silu(pre) nor h.

    σ = sigmoid(pre)    silu(pre) = pre σ    silu'(pre) = σ (1 + pre (1 − σ))
    dup = dh ⊙ silu(pre)                     dpre = dh ⊙ up ⊙ silu'(pre)

pre and up (M, F) are the outputs of gate_proj and up_proj. Plain autograd keeps three tensors of
M·F elements here, pre for silu and silu(pre), up for the product, and down_proj's dA keeps a
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


def product(pre: Tensor, up: Tensor) -> Tensor:
    """silu(pre) ⊙ up, of equal shapes and dtypes, with one tensor written."""
    return F.silu(pre).mul_(up)


def input_grads(
    dh: Tensor, silu_: Tensor, pre: Tensor, up: Tensor, needs_pre: bool, needs_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dpre and dup, ``None`` where unwanted; all (M, F). dup is written over silu(pre).

    Not a new tensor for every step: at (1024, 576) x (576, 1536) in bf16 on one CPU core, forward
    and backward of a block then took 1.15 to 1.21 times plain autograd's time, so 1.00 to 1.05.
    """
    dpre = None
    if needs_pre:
        dpre = dh * up
        torch.ops.aten.silu_backward.grad_input(dpre, pre, grad_input=dpre)
    return dpre, silu_.mul_(dh) if needs_up else None


class SwigluFunction(torch.autograd.Function):
    """The product as an autograd function; twice differentiable."""

    @staticmethod
    def forward(ctx, pre, up):
        """Keep pre, and up where dpre will read it."""
        ctx.save_for_backward(pre, up if ctx.needs_input_grad[0] else None)
        return product(pre, up)

    @staticmethod
    def backward(ctx, dh):
        """Return dpre and dup, ``None`` where it is not wanted."""
        pre, up = ctx.saved_tensors
        needs_pre, needs_up = ctx.needs_input_grad
        silu = F.silu(pre)
        if torch.is_grad_enabled():  # create_graph: torch's silu_backward has no derivative
            sigma = torch.sigmoid(pre)
            slope = sigma * (1 + pre * (1 - sigma))
            return dh * up * slope if needs_pre else None, dh * silu if needs_up else None
        return input_grads(dh, silu, pre, up, needs_pre, needs_up)


def swiglu_product(pre: Tensor, up: Tensor) -> Tensor:
    """Multiply silu(pre) by up, keeping nothing for backward but these two.

        h = silu(pre) ⊙ up

    Under ``torch.compile`` it is the plain expression: the compiler decides which tensors to keep.

    Args:
        pre: Output of gate_proj, any shape, floating dtype. Differentiable.
        up: Output of up_proj, shape and dtype of ``pre``. Differentiable.

    Returns:
        h, shape and dtype of ``pre``; bit for bit ``F.silu(pre) * up``.

    Raises:
        TypeError: If an argument is no floating tensor, or the dtypes differ.
        ValueError: If the shapes differ.

    >>> swiglu_product(torch.tensor([0.0, 2.0]), torch.tensor([5.0, 1.0]))
    tensor([0.0000, 1.7616])
    """
    check_swiglu(pre, up)
    if torch.compiler.is_compiling():
        return F.silu(pre) * up
    if not (torch.is_grad_enabled() and (pre.requires_grad or up.requires_grad)):
        return product(pre, up)
    return SwigluFunction.apply(pre, up)

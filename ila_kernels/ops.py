"""The op of one layer: schema, fake and autograd formula of ``torch.ops.ila.masked_lora_linear``.

``torch.compile`` and exporters see the op. Outside of them the same formula runs as a plain
``autograd.Function``, which skips the Python dispatcher of a custom op: forward and backward of a
(16, 64) x (64, 64) layer at R = 8 took 1.06 of the time of PEFT's own layer that way against 1.81
(fp32, one CPU thread; ``benchmarks/test_call_cost.py`` repeats the comparison).

``paths`` names the module that computes. This file decides which tensors wait for backward, and
returns the gradients in the order of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ila_kernels import eager, paths, swiglu, traced
from ila_kernels.eager import Grads, Needs
from ila_kernels.quant import PackedWeight


class LinearCall(NamedTuple):
    """The arguments of the op, in its order; ``functional.masked_lora_linear`` explains each."""

    x: Tensor
    weight: Tensor | PackedWeight
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float
    impl: str = "eager"
    pre: Tensor | None = None
    up: Tensor | None = None
    activation: str = "silu"


NO_GRADS = (None,) * len(LinearCall._fields)
# `ctx.needs_input_grad` has a flag for each argument; pre and up are neighbours.
_PRE = LinearCall._fields.index("pre")


class Saved(NamedTuple):
    """The tensors that wait for backward; ``None`` where it reads nothing."""

    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor | None
    t: Tensor | None
    seed: Tensor | None
    pre: Tensor | None
    up: Tensor | None


def _forward(c: LinearCall) -> tuple[Tensor, Tensor]:
    paths.ensure_checked(c.impl, c.x.device)
    return paths.linear_path(c.impl).forward(
        c.x, c.weight, c.lora_a, c.lora_b, c.gate, c.bias, c.seed, c.scale, c.dropout_p
    )


def _save(ctx, c: LinearCall, t: Tensor) -> None:
    # A custom op leaves out the flags of pre and up if they were not given, and adds one at the end
    # for an argument of the dispatcher's own, which wants nothing.
    wants_x, *parameters, _seed, _scale, _p, _impl = ctx.needs_input_grad[:_PRE]
    ctx.swiglu_needs = ctx.needs_input_grad[_PRE : _PRE + 2]
    needs = Needs(wants_x or any(ctx.swiglu_needs), *parameters)
    ctx.needs, ctx.scale, ctx.dropout_p, ctx.impl = needs, c.scale, c.dropout_p, c.impl
    ctx.activation = c.activation
    ctx.set_materialize_grads(False)
    # The packed bytes are the model's own; backward unpacks them again.
    ctx.packed = c.weight if isinstance(c.weight, PackedWeight) and needs.x else None
    x = c.x if needs.saves_x and c.pre is None else None
    weight = c.weight if needs.x and ctx.packed is None else None
    t = t if needs.saves_t else None
    ctx.save_for_backward(*Saved(x, weight, c.lora_a, c.lora_b, c.gate, t, c.seed, c.pre, c.up))


def refuse_create_graph() -> None:
    """Raise if backward is asked for a graph of its own.

    t is saved as a constant, so a second derivative would be silently wrong. Not by
    ``once_differentiable``: that one lets a dy pass that requires no grad.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "masked_lora_linear has first derivatives only, so backward cannot run with "
            "create_graph=True; use impl='reference' for higher ones"
        )


def own_dtypes(dy: Tensor, packed: bool) -> AbstractContextManager[None]:
    """Turn autocast off for a packed weight: it brings its own compute dtype."""
    return torch.autocast(dy.device.type, enabled=False) if packed else nullcontext()


def _backward(ctx, dy: Tensor | None, run: Callable[..., Grads]) -> tuple[Tensor | None, ...]:
    refuse_create_graph()
    if dy is None:
        return NO_GRADS
    s, acted, dpre, dup = Saved(*ctx.saved_tensors), None, None, None
    x, weight = s.x, ctx.packed or s.weight
    if s.pre is not None:
        acted = swiglu.activated(s.pre, ctx.activation)
        # In the dtype of dy: under autocast the x of forward was rounded to it.
        x = (acted * s.up).to(dy.dtype) if ctx.needs.saves_x else None
    options = {"scale": ctx.scale, "dropout_p": ctx.dropout_p, "needs": ctx.needs}
    with own_dtypes(dy, ctx.packed is not None):
        grads = run(dy, x, weight, s.lora_a, s.lora_b, s.gate, s.t, s.seed, **options)
    if acted is not None and grads.x is not None:
        dx = grads.x.to(s.pre.dtype)
        dpre, dup = swiglu.input_grads(dx, acted, s.pre, s.up, *ctx.swiglu_needs, ctx.activation)
        grads = grads._replace(x=None)
    no_seed = no_scale = no_dropout_p = no_impl = no_activation = None
    return (*grads, no_seed, no_scale, no_dropout_p, no_impl, dpre, dup, no_activation)


class MaskedLoraLinearFunction(torch.autograd.Function):
    """The op as an autograd function; takes the fields of ``LinearCall``, returns y only."""

    @staticmethod
    def forward(ctx, *arguments):
        """Compute y and keep the tensors that backward will read."""
        call = LinearCall(*arguments)
        y, t = _forward(call)
        _save(ctx, call, t)
        return y

    @staticmethod
    def backward(ctx, dy):
        """Return the gradients in the order of the arguments."""
        return _backward(ctx, dy, paths.linear_path(ctx.impl).backward)


@torch.library.custom_op("ila::masked_lora_linear", mutates_args=())
def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    impl: str = "eager",
    pre: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """x (M, K), W (N, K), A (R, K), B (N, R) -> y (M, N), t (M, R); t is not differentiable.

    Where pre and up (M, K) are given, x = activation(pre) ⊙ up and is not differentiable here:
    backward recomputes x instead of keeping it, and returns the gradients of pre and up.
    """
    numbers = (scale, dropout_p, impl)
    arguments = (x, weight, lora_a, lora_b, gate, bias, seed, *numbers, pre, up, activation)
    return _forward(LinearCall(*arguments))


@masked_lora_linear.register_fake
def _(
    x, weight, lora_a, lora_b, gate, bias, seed, scale, dropout_p, impl="eager", pre=None, up=None,
    activation="silu",
):  # fmt: skip
    t = x.new_empty(x.shape[0], lora_a.shape[0], dtype=eager.thin_dtype(x))
    return x.new_empty(x.shape[0], weight.shape[0]), t


def _setup_context(ctx, inputs, output):
    _y, t = output
    ctx.mark_non_differentiable(t)
    _save(ctx, LinearCall(*inputs), t)


def _op_backward(ctx, dy, _dt):
    # A formula of library calls can be traced; kernels come as an op.
    by_op = partial(traced.linear_backward, ctx.impl)
    return _backward(ctx, dy, eager.backward if ctx.impl == "eager" else by_op)


masked_lora_linear.register_autograd(_op_backward, setup_context=_setup_context)

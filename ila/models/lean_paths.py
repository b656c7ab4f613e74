"""The code that computes the loss of a frozen head: a library that is as exact, else our chunks.

``loss_path`` decides, a pure function of the kind of tensors and of the libraries at hand:

- ``torch.nn.functional.linear_cross_entropy`` (torch ≥ 2.13) in fp32 and fp64. In 16 bits it adds
  up the loss in 16 bits: of 440 tokens' sum, 5 % were lost to bf16.
- Liger's fused linear cross-entropy on a GPU, in 16 and 32 bits.
- The chunks of ``lean_loss`` everywhere else; inside ``torch.compile`` as one custom op.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import FunctionCtx

from ila.models.lean_loss import (
    IDENTITY,
    LogitMap,
    chunk_rows,
    counted_rows,
    sum_and_gradient,
    wide,
)

TORCH, LIGER, CHUNKS = "torch", "liger", "chunks"


class LossPath(NamedTuple):
    """Which code computes the loss, and why."""

    path: str
    reason: str


def loss_path(
    dtype: torch.dtype,
    device: str,
    logit_map: LogitMap = IDENTITY,
    *,
    traced: bool = False,
    has_torch: bool,
    has_liger: bool,
) -> LossPath:
    """Choose the code that computes the loss.

    Args:
        dtype: Of hidden states and head, as they are multiplied.
        device: Its type, such as "cuda".
        logit_map: The map of the logits, as ``lean_loss`` defines it.
        traced: Whether the forward is compiled, or runs on tensors without values.
        has_torch: Whether torch has ``linear_cross_entropy`` with chunks.
        has_liger: Whether Liger is installed.

    >>> loss_path(torch.float32, "cpu", has_torch=True, has_liger=False).path
    'torch'
    >>> loss_path(torch.bfloat16, "cuda", has_torch=True, has_liger=True).path
    'liger'
    >>> loss_path(torch.bfloat16, "cpu", has_torch=True, has_liger=True).path
    'chunks'
    """
    if traced:
        return LossPath(CHUNKS, "compiled or without values: libraries look at them")
    if not logit_map.is_identity:
        return LossPath(CHUNKS, "the model scales or caps its logits")
    if has_torch and dtype in (torch.float32, torch.float64):
        return LossPath(TORCH, "torch.nn.functional.linear_cross_entropy")
    if has_liger and device == "cuda" and dtype != torch.float64:
        return LossPath(LIGER, "Liger's fused linear cross-entropy")
    if has_torch:
        return LossPath(CHUNKS, "torch's own adds up the loss in 16 bits")
    return LossPath(CHUNKS, "no library for it here")


def path_here(dtype: torch.dtype, device: str, logit_map: LogitMap) -> LossPath:
    """Choose with the libraries that are installed here."""
    return loss_path(dtype, device, logit_map, has_torch=has_torch(), has_liger=has_liger())


@cache
def has_torch() -> bool:
    """Tell whether torch computes linear and cross-entropy together, in chunks."""
    return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")


@cache
def has_liger() -> bool:
    """Tell whether Liger's kernels are installed."""
    return find_spec("liger_kernel") is not None


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_map: LogitMap = IDENTITY,
) -> Tensor:
    """Σ of the cross-entropies of f(h Wᵀ + b); differentiable in h alone, once.

    Args:
        hidden: h (M, K).
        weight: W (V, K), of the dtype of h; no gradient.
        bias: b (V,) of that dtype, or None; no gradient.
        targets: t (M,), int64; a row with ``lean_loss.IGNORED`` does not count.
        logit_map: f.

    Returns:
        A scalar in fp32 (fp64 for fp64).
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        options = (logit_map.scale, logit_map.cap, wanted)
        return lean_cross_entropy(hidden, weight, bias, targets, *options)[0]
    path = _path_of(hidden, logit_map)
    if path == CHUNKS:
        return _Chunks.apply(hidden, weight, bias, targets, logit_map, wanted)
    at = counted_rows(hidden, targets)
    compute = _by_torch if path == TORCH else _by_liger
    return compute(hidden.index_select(0, at), weight, bias, targets[at])


def _path_of(hidden: Tensor, logit_map: LogitMap) -> str:
    without_values = isinstance(hidden, FakeTensor) or hidden.is_meta
    return loss_path(
        hidden.dtype,
        hidden.device.type,
        logit_map,
        traced=without_values,
        has_torch=has_torch(),
        has_liger=has_liger(),
    ).path


def _by_torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    if len(targets) == 0:
        return hidden.sum()
    rows = chunk_rows(weight.shape[0], hidden.dtype)
    # A second backward of the same graph works with every path.
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True, batch_chunk_size=rows)
    return F.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, reduction="sum", options=options
    )


def _by_liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if len(targets) == 0:
        return hidden.sum(dtype=wide(hidden.dtype))
    return liger_fused_linear_cross_entropy(hidden, weight, targets, bias, reduction="sum")


class _Chunks(torch.autograd.Function):
    """``sum_and_gradient``, operator by operator: profilers and counters see each."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_map: LogitMap,
        wanted: bool,
    ) -> Tensor:
        total, gradient = sum_and_gradient(hidden, weight, bias, targets, logit_map, wanted)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, grad), None, None, None, None, None


def scaled(gradient: Tensor, by: Tensor) -> Tensor:
    """Return a gradient times a scalar, rounded once: 1/N in 16 bits would be off for all of it."""
    # One dimension: a scalar would be rounded to 16 bits first. No copy in 32 bits either.
    return torch.mul(gradient, by.reshape(1), out=torch.empty_like(gradient))


@torch.library.custom_op("ila::lean_cross_entropy", mutates_args=())
def lean_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    cap: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """``sum_and_gradient`` as one operator, for ``torch.compile``."""
    return sum_and_gradient(hidden, weight, bias, targets, LogitMap(scale, cap), with_gradient)


@lean_cross_entropy.register_fake
def _(hidden, weight, bias, targets, scale, cap, with_gradient):
    gradient = torch.empty_like(hidden) if with_gradient else hidden.new_empty(0, 0)
    return hidden.new_empty((), dtype=wide(hidden.dtype)), gradient


def _keep_gradient(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: FunctionCtx, grad: Tensor | None, grad_of_gradient: Tensor | None):
    if grad_of_gradient is not None:
        raise RuntimeError("the lean head can be differentiated once, not twice")
    (gradient,) = ctx.saved_tensors
    dh = None if grad is None else scaled(gradient, grad)
    return dh, None, None, None, None, None, None


lean_cross_entropy.register_autograd(_backward, setup_context=_keep_gradient)

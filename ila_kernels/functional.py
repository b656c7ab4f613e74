"""The public functions: validate, flatten to two dimensions, call the op, restore the shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ila_kernels import eager
from ila_kernels.autocast import autocast_dtype, outside_autocast, rounded
from ila_kernels.config import KERNEL_IMPLS, resolve_impl
from ila_kernels.device import call_of
from ila_kernels.dispatch import run_group, run_linear
from ila_kernels.dropout import draw_seed
from ila_kernels.group import Member
from ila_kernels.ops import LinearCall
from ila_kernels.quant import PackedWeight
from ila_kernels.validate import (
    check_dropout,
    check_group,
    check_linear,
    check_list,
    check_swiglu,
    check_x,
)


def masked_lora_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    impl: str = "auto",
    seed: Tensor | None = None,
    swiglu: tuple[Tensor, Tensor] | None = None,
    activation: str = "silu",
) -> Tensor:
    """Apply a linear layer with a gated low-rank update.

        y = x Wᵀ + bias + γα (dropout(x) Aᵀ) Bᵀ

    Computes the gradients that are asked for and saves the tensors that they read: a call in which
    only the gate requires grad keeps t (M, R) and not x.

    The backward is derived by hand, with one exception: on a CPU, at up to 64 rows, without gate
    and dropout, ``"auto"`` and ``"eager"`` use torch's own autograd, because the overhead of a
    Python function is the cost there. The numbers are as good; autograd saves more tensors, and it
    has second derivatives, where every other call refuses ``create_graph=True``.

    Args:
        x: Input, shape (..., K), floating dtype. Differentiable.
        weight: W, shape (N, K), dtype of x (under autocast both are cast). Differentiable. Or a
            ``PackedWeight`` (4-bit, int8), frozen: its products run in its own compute dtype, and
            W is unpacked again in backward, never kept.
        lora_a: A, shape (R, K), R ≥ 1, any floating dtype. Differentiable.
        lora_b: B, shape (N, R), any floating dtype. Differentiable.
        gate: γ, a floating tensor with one element, or ``None`` for 1. Differentiable; never read
            by the host.
        bias: Shape (N,), dtype of x (any over a packed weight), or ``None``. Differentiable.
        scale: α, the LoRA scaling.
        dropout_p: Probability in [0, 1) of dropping an element of x on the low-rank branch;
            applied whenever it is positive.
        impl: ``"auto"`` may choose; every other word runs or raises. ``"eager"``: library GEMMs.
            ``"triton"``: fused kernels. ``"hybrid"``: library GEMMs for the products with W, Triton
            kernels for the R-thin ones. Both take bf16, fp16 and fp32 on a CUDA or ROCm GPU, and
            check themselves there on first use; their dropout mask for a seed is not eager's.
            ``"reference"``: the definition. ``prefer`` sets the choice of auto on a GPU.
        seed: int64 CPU tensor of shape (1,) that fixes the dropout mask; drawn from torch's
            default generator if ``None``.
        swiglu: (pre, up) of the shape of x, where x is ``swiglu_product(pre, up, activation)``:
            backward recomputes x from them instead of keeping it, and its gradient goes to them
            directly. ``"reference"``, and a CPU at few rows, keep x and go through it.
        activation: That of ``swiglu``, as ``swiglu_product`` takes it; not read without.

    Returns:
        y, shape (..., N), dtype of x (of autocast where it is on and W is not packed), accumulated
        in at least fp32.

    Raises:
        TypeError: If an argument is not a tensor or has a dtype that does not fit.
        ValueError: If a shape, a device, a range or ``impl`` does not fit; the message names the
            argument, the expectation and the value.
        RuntimeError: If ``impl="triton"`` cannot run here.

    >>> x, w = torch.ones(2, 3), torch.eye(3)
    >>> a, b = torch.ones(1, 3), torch.ones(3, 1)
    >>> masked_lora_linear(x, w, a, b, scale=0.5)
    tensor([[2.5000, 2.5000, 2.5000],
            [2.5000, 2.5000, 2.5000]])
    >>> masked_lora_linear(x, w, a, b, torch.zeros(())).equal(x)
    True
    """
    if gate is None and bias is None and seed is None and dropout_p == 0.0 and impl == "auto":
        if _is_plain_and_short(x, weight, lora_a, lora_b, scale):
            return _shaped(eager.short_forward(_flat(x), weight, lora_a, lora_b, None, scale), x)
    check_x(x)
    dtype = autocast_dtype(x)
    if dtype is not None and isinstance(weight, PackedWeight):
        options = {"bias": bias, "scale": scale, "dropout_p": dropout_p, "impl": impl, "seed": seed}
        options |= {"swiglu": swiglu, "activation": activation}

        def apart(inner: Tensor) -> Tensor:
            return masked_lora_linear(inner, weight, lora_a, lora_b, gate, **options)

        return outside_autocast(x, dtype, [weight], apart)
    if dtype is not None:
        x, weight, bias = (rounded(t, dtype) for t in (x, weight, bias))
    check_linear(x, weight, lora_a, lora_b, gate, bias, scale)
    if swiglu is not None:
        check_swiglu(*swiglu, activation, x)
    x2d = _flat(x)
    chosen = _chosen(impl, x2d, [weight], [lora_a], dropout_p)
    seed = _seeds(dropout_p, seed, 1)
    pre, up = (None, None) if swiglu is None else map(_flat, swiglu)
    numbers = float(scale), float(dropout_p)
    arguments = (weight, lora_a, lora_b, gate, bias, seed, *numbers, chosen, pre, up, activation)
    return _shaped(run_linear(LinearCall(x2d, *arguments)), x)


def masked_lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    gates: Sequence[Tensor | None] | None = None,
    *,
    biases: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | float = 1.0,
    dropout_p: float = 0.0,
    impl: str = "auto",
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Apply several masked LoRA linears to one x, as q/k/v or gate/up do.

        yᵢ = x Wᵢᵀ + biasᵢ + γᵢαᵢ (dropoutᵢ(x) Aᵢᵀ) Bᵢᵀ

    Equal to calling ``masked_lora_linear`` for each member; x is shrunk once for all A's and one
    dx accumulates over all members.

    Args:
        x: Input, shape (..., K).
        weights: W of each member, shapes (Nᵢ, K), dense or packed.
        lora_as: A of each member, shapes (Rᵢ, K); an entry ``None`` closes that member (bare
            linear). The list itself is needed: without any adapter there is nothing to group.
        lora_bs: B of each member, shapes (Nᵢ, Rᵢ); ``None`` exactly where A is.
        gates: γ of each member or ``None``; or ``None`` for no gates.
        biases: Base bias of each member or ``None``; or ``None`` for none.
        scales: α of each member, or one number for all.
        dropout_p: As in ``masked_lora_linear``; masks are independent between members.
        impl: As in ``masked_lora_linear``.
        seed: int64 CPU tensor with one seed per member; drawn if ``None``.

    Returns:
        The y of each member, shapes (..., Nᵢ), dtype of x.

    Raises:
        TypeError: As ``masked_lora_linear``; the message names the member. Or if an argument that
            should be a list is not.
        ValueError: As ``masked_lora_linear``, and if the lists differ in length or are empty.

    >>> x, w = torch.ones(2, 3), torch.eye(3)
    >>> a, b = torch.ones(1, 3), torch.ones(3, 1)
    >>> q, k = masked_lora_linear_group(x, [w, w], [a, None], [b, None])
    >>> q[0, 0].item(), k[0, 0].item()
    (4.0, 1.0)
    """
    check_x(x)
    check_list("weights", weights)
    count = len(weights)
    gates = [None] * count if gates is None else gates
    biases = [None] * count if biases is None else biases
    check_list("biases", biases)
    scales = [scales] * count if isinstance(scales, Real) else scales
    dtype = autocast_dtype(x)
    packed = [w for w in weights if isinstance(w, PackedWeight)]
    if dtype is not None and packed:
        rest = {"scales": scales, "dropout_p": dropout_p, "impl": impl, "seed": seed}

        def apart(inner: Tensor) -> tuple[Tensor, ...]:
            ws, bs = ([rounded(t, inner.dtype) for t in column] for column in (weights, biases))
            return masked_lora_linear_group(inner, ws, lora_as, lora_bs, gates, biases=bs, **rest)

        return outside_autocast(x, dtype, packed, apart)
    if dtype is not None:
        x = x.to(dtype)
        weights, biases = ([rounded(t, dtype) for t in column] for column in (weights, biases))
    check_group(x, weights, lora_as, lora_bs, gates, biases, scales)
    x2d = _flat(x)
    chosen = _chosen(impl, x2d, weights, lora_as, dropout_p)
    seeds = _group_seeds(dropout_p, seed, [a is not None for a in lora_as])
    columns = (weights, lora_as, lora_bs, gates, biases, seeds, map(float, scales))
    members = [Member(*row) for row in zip(*columns, strict=True)]
    return tuple(_shaped(y, x) for y in run_group(x2d, members, float(dropout_p), chosen))


def group_pays(x: Tensor, adapters: int, bare: int = 0) -> bool:
    """Tell whether one ``masked_lora_linear_group`` should beat a call for each member.

    It does not at few rows on a CPU, where overheads dominate: q, k and v of a 576-wide model,
    forward and backward in bf16, R = 8, took 1.3 times as long together at 16 rows, 1.2 at 64,
    0.87 at 96 and 0.81 at 1024 (CPU time, one thread, medians of 41 to 201 interleaved rounds).

    Args:
        x: Input, shape (..., K).
        adapters: Members with an adapter.
        bare: Members without one; they share nothing but the gradient of x.

    >>> group_pays(torch.ones(4, 256, 8), 3), group_pays(torch.ones(1, 8), 3)
    (True, False)
    >>> group_pays(torch.ones(4, 256, 8), 1, 2), group_pays(torch.ones(4, 256, 8), 0, 3)
    (True, False)
    """
    if adapters == 0 or adapters + bare < 2:
        return False
    # A compiled graph holds for other numbers of rows too.
    if not x.is_cpu or torch.compiler.is_compiling():
        return True
    return math.prod(x.shape[:-1]) > eager.SHORT_ROWS


_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def _is_plain_and_short(x, weight, lora_a, lora_b, scale) -> bool:
    """Tell whether ``short_forward`` may run at once, in 2 µs; after False the checks follow.

    They and the choice take 8 µs, a tenth of forward and backward at one token.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    try:
        (n, k), (r, a_k), dtype = weight.shape, lora_a.shape, x.dtype
        return (
            (x.is_cpu and weight.is_cpu and lora_a.is_cpu and lora_b.is_cpu)
            and (0 < x.numel() <= eager.SHORT_ROWS * k and x.shape[-1] == k)
            and (a_k == k and r > 0 and lora_b.shape == (n, r))
            and (weight.dtype is dtype and dtype in _FLOATS)
            and (lora_a.dtype in _FLOATS and lora_b.dtype in _FLOATS)
            and (type(scale) is float and math.isfinite(scale))
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def _chosen(
    impl: str,
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight],
    lora_as: Sequence[Tensor | None],
    dropout_p: float,
) -> str:
    packed = any(isinstance(w, PackedWeight) for w in weights)
    if packed and impl in KERNEL_IMPLS:
        raise RuntimeError(
            f"impl={impl!r} was asked for, but W is packed and its products are bitsandbytes'; "
            "use impl='auto' or impl='eager'"
        )
    if packed:  # there is no kernel for it, under any choice of "auto"
        return resolve_impl("eager" if impl == "auto" else impl, x.device.type)[0]
    call = call_of(weights, lora_as, x.shape[0], x.dtype, dropout_p) if impl == "auto" else None
    return resolve_impl(impl, x.device.type, call)[0]


def _flat(x: Tensor) -> Tensor:
    """x (..., K) -> (M, K); ``reshape(-1, K)`` has no answer for K = 0."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) -> (..., N), with the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _seeds(dropout_p: float, seed: Tensor | None, count: int) -> Tensor | None:
    check_dropout(dropout_p, seed, count)
    if dropout_p == 0.0:
        return None
    return draw_seed(count) if seed is None else seed


def _group_seeds(
    dropout_p: float, seed: Tensor | None, is_open: Sequence[bool]
) -> list[Tensor | None]:
    """Return the seed of each member; a closed one draws none.

    It takes no part where nothing wants gradients, and the others' masks must be the same there.
    """
    check_dropout(dropout_p, seed, len(is_open))
    if dropout_p == 0.0:
        return [None] * len(is_open)
    if seed is not None:
        return list(seed.split(1))
    drawn = iter(draw_seed(sum(is_open)).split(1))
    return [next(drawn) if opened else None for opened in is_open]

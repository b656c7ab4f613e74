"""The public functions: validate, flatten to two dimensions, call the op, restore the shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real

import torch
from torch import Tensor

from ila_kernels import eager, ops, reference
from ila_kernels.config import resolve_impl
from ila_kernels.device import call_of
from ila_kernels.dropout import draw_seed, keep_mask
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
) -> Tensor:
    """Apply a linear layer with a gated low-rank update.

        y = x Wᵀ + bias + γα (dropout(x) Aᵀ) Bᵀ

    Only the gradients that are asked for are computed, and only what they read is saved: a call
    in which just the gate requires grad keeps t (M, R) and not x.

    The backward is derived by hand, but for one case: on a CPU, with at most 64 rows and neither
    gate nor dropout, ``"auto"`` and ``"eager"`` leave y to torch's own autograd, because overheads
    are the cost there. Its numbers are as good, but it saves what autograd saves and has second
    derivatives, where every other call refuses ``create_graph=True``.

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
        impl: ``"auto"`` may choose; ``"eager"``, ``"triton"``, ``"reference"`` run or raise.
            ``prefer`` says what auto takes on a GPU. ``"triton"`` takes bf16, fp16 and fp32 on a
            CUDA or ROCm GPU, and checks itself there against the reference on first use; its
            dropout mask for a seed is not eager's.
        seed: int64 CPU tensor of shape (1,) that fixes the dropout mask; drawn from torch's
            default generator if ``None``.
        swiglu: (pre, up) of the shape of x, where x is ``swiglu_product(pre, up)``: backward
            recomputes x from them instead of keeping it, and its gradient goes to them directly.
            ``"reference"``, and a CPU at few rows, keep x and go through it.

    Returns:
        y, shape (..., N), dtype of x (of autocast where it is on and W is not packed), accumulated
        in at least fp32.

    Raises:
        TypeError: If an argument is not a tensor or has a dtype that does not fit.
        ValueError: If a shape, a device, a range or ``impl`` does not fit; the message names the
            argument, what was expected and what came.
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
            y = eager.short_forward(_flat(x), weight, lora_a, lora_b, None, scale)
            return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
    check_x(x)
    dtype = _autocast_dtype(x)
    packed = isinstance(weight, PackedWeight)
    if dtype is not None and packed:
        options = {"bias": bias, "scale": scale, "dropout_p": dropout_p, "impl": impl, "seed": seed}
        adapter = (lora_a, lora_b, gate)
        apart = partial(masked_lora_linear, **options, swiglu=swiglu)
        return _outside_autocast(x, dtype, [weight], lambda x: apart(x, weight, *adapter))
    if dtype is not None:
        x, weight, bias = (_rounded(t, dtype) for t in (x, weight, bias))
    check_linear(x, weight, lora_a, lora_b, gate, bias, scale)
    scale = float(scale)
    if swiglu is not None:
        check_swiglu(*swiglu, x)
    x2d = _flat(x)
    chosen = _chosen(impl, x2d, [weight])
    seed = _seeds(dropout_p, seed, 1)
    if chosen == "reference":
        weight = _dense(weight, x.dtype)
        keep = None
        if seed is not None:
            keep = keep_mask(seed, *x2d.shape, dropout_p, x.device)
        y = reference.masked_lora_linear(
            x2d, weight, lora_a, lora_b, gate, bias, scale, keep, dropout_p
        )
    else:
        arguments = (weight, lora_a, lora_b, gate, bias, seed, scale, float(dropout_p))
        if swiglu is None:
            arguments = (x2d, *arguments, chosen, None, None)
        else:
            arguments = (x2d.detach(), *arguments, chosen, *map(_flat, swiglu))
        plain = chosen == "eager" and gate is None and seed is None and not packed
        if torch.compiler.is_compiling() and not packed:
            y, _ = torch.ops.ila.masked_lora_linear(*arguments)
        elif plain and eager.is_short(x2d):
            y = eager.short_forward(x2d, weight, lora_a, lora_b, bias, scale)
        else:
            y = ops.MaskedLoraLinearFunction.apply(*arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


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
        TypeError: As ``masked_lora_linear``; the message names the member. Or if a list is none.
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
    dtype = _autocast_dtype(x)
    packed = [w for w in weights if isinstance(w, PackedWeight)]
    if dtype is not None and packed:
        options = {"scales": scales, "dropout_p": dropout_p, "impl": impl, "seed": seed}

        def apart(x: Tensor) -> tuple[Tensor, ...]:
            ws, bs = ([_rounded(t, x.dtype) for t in column] for column in (weights, biases))
            return masked_lora_linear_group(x, ws, lora_as, lora_bs, gates, biases=bs, **options)

        return _outside_autocast(x, dtype, packed, apart)
    if dtype is not None:
        x = x.to(dtype)
        weights, biases = ([_rounded(t, dtype) for t in column] for column in (weights, biases))
    check_group(x, weights, lora_as, lora_bs, gates, biases, scales)
    x2d = _flat(x)
    chosen = _chosen(impl, x2d, weights)
    seeds = _group_seeds(dropout_p, seed, [a is not None for a in lora_as])
    scales, columns = [float(s) for s in scales], (weights, lora_as, lora_bs, gates, biases)
    if chosen != "reference" and torch.compiler.is_compiling() and not packed:
        lists = [[ops.absent(x2d) if t is None else t for t in column] for column in columns]
        options = (_one_tensor(seeds), scales, float(dropout_p), chosen)
        ys = torch.ops.ila.masked_lora_linear_group(x2d, *lists, *options)[:count]
    else:
        columns += (seeds,)
        if chosen == "reference":
            ys = _reference_group(x2d, columns, scales, dropout_p)
        else:
            flat = (tensor for member in zip(*columns, strict=True) for tensor in member)
            options = (chosen, float(dropout_p), scales)
            ys = ops.MaskedLoraLinearGroupFunction.apply(*options, x2d, *flat)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def group_pays(x: Tensor, adapters: int, bare: int = 0) -> bool:
    """Whether one ``masked_lora_linear_group`` of x is expected to beat a call for each member.

    Not at few rows on a CPU, where overheads decide: q, k and v of a 576-wide model, forward and
    backward in bf16, R = 8, took 1.3 times as long together at 16 rows, 1.2 at 64, 0.87 at 96 and
    0.81 at 1024 (CPU time, one thread, medians of 41 to 201 interleaved rounds).

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


def _reference_group(x, columns, scales, dropout_p) -> list[Tensor]:
    ys = []
    for (w, a, b, gate, bias, seed), scale in zip(zip(*columns, strict=True), scales, strict=True):
        w = _dense(w, x.dtype)
        if a is None:
            ys.append(torch.nn.functional.linear(x, w, bias))
            continue
        keep = None if seed is None else keep_mask(seed, *x.shape, dropout_p, x.device)
        ys.append(reference.masked_lora_linear(x, w, a, b, gate, bias, scale, keep, dropout_p))
    return ys


_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def _is_plain_and_short(x, weight, lora_a, lora_b, scale) -> bool:
    """Whether ``short_forward`` may run at once; False decides nothing, the full checks follow.

    The checks and choices below take 8 µs, which at one token is a tenth of forward and backward;
    this takes 2.
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


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Dtype that ``F.linear`` would compute in under autocast, ``None`` where it casts nothing.

    Only x, W and bias are cast here: adapters are rounded inside the op.
    """
    device_type = x.device.type
    # Asking whether autocast is on raises for device types that have none, such as meta.
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return None
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def _outside_autocast(
    x: Tensor,
    dtype: torch.dtype,
    weights: Sequence[PackedWeight],
    call: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
) -> Tensor | tuple[Tensor, ...]:
    """Run ``call`` on x as a packed linear of bitsandbytes does: it knows no autocast.

    x is rounded to autocast's dtype only where the weights would round it to the same; y has the
    dtype of x.
    """
    inner = x.to(dtype) if all(w.compute_dtype == dtype for w in weights) else x
    with torch.autocast(x.device.type, enabled=False):
        y = call(inner)
    return y.to(x.dtype) if isinstance(y, Tensor) else tuple(part.to(x.dtype) for part in y)


def _chosen(impl: str, x: Tensor, weights: Sequence[Tensor | PackedWeight]) -> str:
    packed = any(isinstance(w, PackedWeight) for w in weights)
    if packed and impl == "triton":
        raise RuntimeError(
            "impl='triton' was asked for, but W is packed and its products are bitsandbytes'; "
            "use impl='auto' or impl='eager'"
        )
    if packed:  # "auto" may come to choose Triton; a packed W leaves it no choice
        return resolve_impl("eager" if impl == "auto" else impl, x.device.type)[0]
    call = call_of(weights[0], sum(w.shape[0] for w in weights), x.shape[0], x.dtype)
    return resolve_impl(impl, x.device.type, call)[0]


def _dense(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    return weight.dense(dtype) if isinstance(weight, PackedWeight) else weight


def _rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # What is no floating tensor goes on as it is, to the check that names it.
    is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return tensor.to(dtype) if is_float else tensor


def _flat(x: Tensor) -> Tensor:
    """x (..., K) -> (M, K); ``reshape(-1, K)`` has no answer for K = 0."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def _seeds(dropout_p: float, seed: Tensor | None, count: int) -> Tensor | None:
    check_dropout(dropout_p, seed, count)
    if dropout_p == 0.0:
        return None
    return draw_seed(count) if seed is None else seed


def _group_seeds(
    dropout_p: float, seed: Tensor | None, is_open: Sequence[bool]
) -> list[Tensor | None]:
    """The seed of each member; a closed one draws none.

    So the others' masks do not hang on whether it takes part: without gradients, as in the first
    forward of a reentrant checkpoint, it does not.
    """
    check_dropout(dropout_p, seed, len(is_open))
    if dropout_p == 0.0:
        return [None] * len(is_open)
    if seed is not None:
        return list(seed.split(1))
    drawn = iter(draw_seed(sum(is_open)).split(1))
    return [next(drawn) if opened else None for opened in is_open]


def _one_tensor(seeds: Sequence[Tensor | None]) -> Tensor | None:
    """Seeds (count,) as a compiled op takes them; nobody reads that of a closed member."""
    if all(seed is None for seed in seeds):
        return None
    unread = torch.zeros(1, dtype=torch.int64, device="cpu")
    return torch.cat([unread if seed is None else seed for seed in seeds])

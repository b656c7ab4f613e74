"""The production path on any device: library GEMMs, the update before the base, derived backward.

    t  = x̂ Aᵀ                    u  = dy B
    y  = x Wᵀ + bias + γα t Bᵀ    dx = dy W + γα (u A) ⊙ keep/(1−p)
    dA = γα uᵀ x̂    dB = γα dyᵀ t    dγ = α ⟨u, t⟩    dW = dyᵀ x    dbias = Σ_m dy

The update is written first, and the base GEMM adds to it (β = 1). Beside the frozen linear this
moves M·K + 2·M·N elements forward (eager PEFT: M·K + 6·M·N), of which M·N are read inside the GEMM,
and it keeps small updates. A 16-bit y holds 8 or 11 bits: an update added to it afterwards is lost
where it is less than half of its last bit, and that is where training starts (B = 0). Added in the
GEMM's fp32 accumulator, before the one rounding of y, it stays. At |update| = 10⁻³ |y| in bf16 all
of it stays, and 55 % if it is added afterwards (``tests/kernels/test_small_updates.py``).

Four cases keep the base first: a packed weight, whose product is another library's; few rows on a
CPU (``SHORT_ROWS``); a large bf16 product on a CPU (``is_large``); and, as far as rounding goes,
a bias, which is added to the update before the GEMM, so an update far below the bias is rounded
against it.

An update that is larger than the base is rounded at its own size first, and a small base then loses
as much: the bound of ``testing.assert_within_rounding`` is relative to y.

Adapters in another dtype are rounded to that of x while they are R-thin. γα is folded into B or
into R-thin results on the device, so a gate is never read by the host.

x, dy, y are two-dimensional here; ``functional`` does the reshaping.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ila_kernels.dropout import keep_mask
from ila_kernels.products import add_product, folded, scaled_product, unscaled, update_first
from ila_kernels.quant import PackedWeight, input_grad, linear


class Needs(NamedTuple):
    """The wanted gradients; they decide which products run and which tensors are saved."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    gate: bool
    bias: bool

    @property
    def saves_x(self) -> bool:
        """Tell whether backward reads x: for dA and dW only, so not in the mask search."""
        return self.lora_a or self.weight

    @property
    def saves_t(self) -> bool:
        """Tell whether backward reads t (M, R): for dB and dγ."""
        return self.lora_b or self.gate

    @property
    def makes_u(self) -> bool:
        """Tell whether backward computes u (M, R): for dx, dA and dγ."""
        return self.x or self.lora_a or self.gate


class Grads(NamedTuple):
    """Gradients in the order of ``Needs``; an unwanted one is ``None``."""

    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    gate: Tensor | None
    bias: Tensor | None


# At few rows on a CPU the overheads are the cost: oneDNN sets up each bf16/fp16 product in about
# 20 µs where fp32 takes 3, and a Python autograd function costs 20 µs a step. So up to this many
# rows the R-thin products of bf16/fp16 run in fp32, and torch's own autograd differentiates the
# plainest case (``short_forward``). At most 64 rows of x are copied. The base product stays first
# there: the update before it took 1.03 to 1.09 of the time up to 16 rows in bf16 (forward and
# backward, one thread, medians of 60 interleaved rounds), and 0.97 to 0.99 at 64.
SHORT_ROWS = 64
# A bf16 result of so many elements (1 MiB), or whose sums have more terms than this, keeps the base
# first on a CPU: with β = 1 oneDNN's product takes up to 1.07 of the time there (dx of 1024 x
# 1536), and forward and backward of a layer 1.01 to 1.03. For less, both orders take the same time
# within 0.01, and so they do in fp32 and fp16 at every size. One thread of an AMD EPYC, medians of
# 15 interleaved rounds.
LARGE_RESULT, LONG_SUM = 1 << 19, 1024
_HALF = (torch.bfloat16, torch.float16)


def is_short(x: Tensor) -> bool:
    """Tell whether x (M, ·) has so few rows on a CPU that overheads dominate."""
    return x.device.type == "cpu" and x.shape[0] <= SHORT_ROWS


def thin_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of t, u and the products that make them, for x (or dy) of shape (M, ·)."""
    return torch.float32 if x.dtype in _HALF and is_short(x) else x.dtype


def short_forward(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Compute the y of ``forward`` without gate and dropout, differentiated by autograd.

    Forward and backward of our layer at (16, 64) x (64, 64), R = 8, one thread, in units of PEFT's:
    0.85 in fp32 (by hand 1.07), 0.91 in bf16 with fp32 adapters (by hand 1.24).
    """
    y = F.linear(x, weight, bias)
    thin = torch.float32 if x.dtype in _HALF else x.dtype
    if x.dtype is not thin:
        x = x.to(thin)
    if lora_a.dtype is not thin:
        lora_a = lora_a.to(thin)
    if lora_b.dtype is not thin:
        lora_b = lora_b.to(thin)
    return y.add_(F.linear(F.linear(x, lora_a), lora_b), alpha=scale)


def drop(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """x ⊙ keep, without the factor 1/(1−p), which is folded into R-thin tensors."""
    if seed is None:
        return x
    return x * keep_mask(seed, x.shape[0], x.shape[1], dropout_p, x.device)


def is_large(x: Tensor, columns: int) -> bool:
    """Tell whether a product of x (M, K) with ``columns`` columns is a large bf16 one on a CPU."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    return x.shape[0] * columns >= LARGE_RESULT or x.shape[1] > LONG_SUM


def base_adds(x: Tensor, weight: Tensor | PackedWeight, columns: int) -> bool:
    """Tell whether the base product of x (or dy) adds to the update, or is made first.

    Args:
        x: Of shape (M, ·).
        weight: Frozen W.
        columns: Of the result: N for y, K for dx.
    """
    return not (isinstance(weight, PackedWeight) or is_short(x) or is_large(x, columns))


def shrink(x: Tensor, lora_a: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """t = x̂ Aᵀ. x (M, K), A (R, K) -> (M, R) in the thin dtype."""
    thin = thin_dtype(x)
    a = folded(lora_a, 1.0 / (1.0 - dropout_p), None, thin)
    return torch.mm(drop(x, seed, dropout_p).to(thin), a.t())


def expand_grad(dy: Tensor, lora_b: Tensor) -> Tensor:
    """u = dy B. dy (M, N), B (N, R) -> (M, R) in the thin dtype."""
    thin = thin_dtype(dy)
    return torch.mm(dy.to(thin), folded(lora_b, 1.0, None, thin))


def forward(
    x: Tensor,
    weight: Tensor | PackedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """x (M, K), W (N, K), A (R, K), B (N, R) -> y (M, N), dtype of x, and t (M, R), thin dtype."""
    t = shrink(x, lora_a, seed, dropout_p)
    return expand(x, weight, t, lora_b, gate, bias, scale), t


def expand(
    x: Tensor,
    weight: Tensor | PackedWeight,
    t: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """y = x Wᵀ + bias + γα t Bᵀ. x (M, K), t (M, R) -> y (M, N) in the dtype of x."""
    if not base_adds(x, weight, lora_b.shape[0]):
        return add_product(linear(x, weight, bias), t, lora_b.t(), scale, gate)
    return update_first(x, weight.t(), t, lora_b.t(), scale, gate, bias)


def lowrank_dx(
    u: Tensor,
    lora_a: Tensor,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, float]:
    """γα (u A) ⊙ keep/(1−p) as ``unscaled`` returns it. u (M, R), A (R, K) -> (M, K)."""
    update, beta = unscaled(u, lora_a, scale / (1.0 - dropout_p), gate)
    if seed is not None:
        update.mul_(keep_mask(seed, update.shape[0], update.shape[1], dropout_p, update.device))
    return update, beta


def full_dx(
    dy: Tensor,
    weight: Tensor | PackedWeight,
    u: Tensor,
    lora_a: Tensor,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """dx = dy W + γα (u A) ⊙ keep/(1−p). dy (M, N), u (M, R) -> dx (M, K) in the dtype of dy."""
    adds = base_adds(dy, weight, lora_a.shape[1])
    if seed is None and not adds:
        return add_product(input_grad(dy, weight), u, lora_a, scale, gate)
    update, beta = lowrank_dx(u, lora_a, gate, seed, scale, dropout_p)
    if adds:
        # In the dtype of dy: under autocast u is not, and an addmm in place casts nothing.
        return update.to(dy.dtype).addmm_(dy, weight, beta=beta)
    return input_grad(dy, weight).add_(update, alpha=beta)


def adapter_grads(
    dy: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA (R, K), dB (N, R), dγ (shape of the gate), each in its parameter's dtype."""
    da = db = dgate = None
    if needs.lora_a:
        x_kept = drop(x, seed, dropout_p).to(u.dtype)
        da = scaled_product(u.t(), x_kept, scale / (1.0 - dropout_p), gate, lora_a.dtype)
    if needs.lora_b:
        db = scaled_product(dy.to(t.dtype).t(), t, scale, gate, lora_b.dtype)
    if needs.gate:
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        dgate = (scale * (u.to(wide) * t.to(wide)).sum()).to(gate.dtype).reshape(gate.shape)
    return da, db, dgate


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | PackedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    t: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
) -> Grads:
    """Compute the wanted gradients of ``forward`` from dy (M, N); dx and dW in the dtype of dy."""
    dx = dweight = dbias = u = None
    if needs.makes_u:
        u = expand_grad(dy, lora_b)
    if needs.x:
        dx = full_dx(dy, weight, u, lora_a, gate, seed, scale, dropout_p)
    if needs.weight:
        dweight = torch.mm(dy.t(), x)
    if needs.bias:
        dbias = dy.sum(0)
    da, db, dgate = adapter_grads(dy, x, u, t, lora_a, lora_b, gate, seed, scale, dropout_p, needs)
    return Grads(dx, dweight, da, db, dgate, dbias)

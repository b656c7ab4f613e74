"""The masked LoRA linear on the Triton kernels; the same two functions as ``eager`` has.

forward    shrink, lowrank_gemm                       x read twice, y written once
backward   grad_out, lowrank_gemm, then dA            dy read twice, dx written once

Both take the product with W as an argument: ``hybrid`` passes the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ila_kernels import eager
from ila_kernels.config import grad_tile, one_read_pays, own_grad_a
from ila_kernels.device import target_of
from ila_kernels.eager import Grads, Needs
from ila_kernels.group import Member, shared_grad_a
from ila_kernels.kernels.grad_a import Adapter, grad_a
from ila_kernels.kernels.grad_out import grad_out
from ila_kernels.kernels.launch import TL_DTYPES, seed_number
from ila_kernels.kernels.lowrank_gemm import lowrank_gemm
from ila_kernels.kernels.shrink import shrink


def check_dtype(dtype: torch.dtype) -> None:
    """Raise unless the kernels compute in this dtype."""
    if dtype not in TL_DTYPES:
        raise TypeError(f"impl='triton' computes in bfloat16, float16 or float32, got {dtype}")


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    *,
    product: Callable[..., Tensor] = lowrank_gemm,
) -> tuple[Tensor, Tensor]:
    """x (M, K), W (N, K), A (R, K), B (N, R) -> y (M, N) and t (M, R), both in the dtype of x.

    ``product`` computes P Q + bias + γα U V.
    """
    check_dtype(x.dtype)
    with torch.cuda.device(x.device):
        (t,) = shrink(x, [lora_a], None if seed is None else [seed_number(seed)], dropout_p)
        return product(x, weight.t(), t, lora_b.t(), scale, gate, bias), t


def parameter_grads(
    dy: Tensor, x: Tensor | None, m: Member, dropout_p: float, with_da: bool = True
) -> tuple[Tensor | None, Grads]:
    """u (M, R), for dx and dA, and every wanted gradient but dx, from dy (M, N).

    Without ``with_da`` dA is left to the caller.
    """
    u = da = db = dgate = None
    if m.is_open:
        u, db, dgate = _adapter_grads(dy, m)
        (da,) = grads_of_a(x, [u], [m], dropout_p) if with_da else (None,)
    dweight = torch.mm(dy.t(), x) if m.needs.weight else None
    return u, Grads(None, dweight, da, db, dgate, dy.sum(0) if m.needs.bias else None)


def _adapter_grads(dy: Tensor, m: Member) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """u, dB and dγ of an open member."""
    needs, (n, r), u, db, dgate = m.needs, m.lora_b.shape, None, None, None
    both = needs.makes_u and needs.lora_b
    size = dy.element_size()
    if both and one_read_pays(n, r, size, grad_tile(r, size, target_of(dy)).n):
        u, db, inner = grad_out(dy, m.lora_b, m.t, m.scale, m.gate, m.lora_b.dtype, needs.gate)
        dgate = inner.to(m.gate.dtype).reshape(m.gate.shape) if needs.gate else None
        return u, db, dgate
    if needs.makes_u:
        (u,) = shrink(dy, [m.lora_b.t()])
    # One product of library GEMMs remains: nothing to fuse it with.
    rest = needs._replace(lora_a=False)
    adapter = (m.lora_a, m.lora_b, m.gate)
    _, db, dgate = eager.adapter_grads(dy, None, u, m.t, *adapter, None, m.scale, 0.0, rest)
    return u, db, dgate


def grads_of_a(
    x: Tensor | None, us: Sequence[Tensor | None], members: Sequence[Member], dropout_p: float
) -> list[Tensor | None]:
    """dA (R, K) of every member that wants it, from one read of x."""
    wanted = [u is not None and m.needs.lora_a for u, m in zip(us, members, strict=True)]
    if not any(wanted):
        return [None] * len(members)
    most = max(m.lora_a.shape[0] for m, wants in zip(members, wanted, strict=True) if wants)
    if not own_grad_a(most, x.element_size(), dropout_p > 0.0):
        return shared_grad_a(x, us, members)
    adapters = [
        Adapter(u, _seed_of(m), m.scale, m.gate, m.lora_a.dtype)
        for u, m, wants in zip(us, members, wanted, strict=True)
        if wants
    ]
    das = iter(grad_a(x, adapters, dropout_p))
    return [next(das) if wants else None for wants in wanted]


def _seed_of(m: Member) -> int | None:
    return None if m.seed is None else seed_number(m.seed)


def input_grad(
    dy: Tensor, u: Tensor, m: Member, dropout_p: float, out: Tensor | None = None
) -> Tensor:
    """dx (M, K) = dy W + γα (u A) ⊙ keep/(1−p), added to the content of ``out``."""
    update = (u, m.lora_a, m.scale, m.gate, None, _seed_of(m), dropout_p)
    return lowrank_gemm(dy, m.weight, *update, out=out)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    t: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
    *,
    dx_of: Callable[[Tensor, Tensor, Member, float], Tensor] = input_grad,
) -> Grads:
    """Return all wanted gradients of ``forward`` from dy (M, N); ``dx_of`` computes dx."""
    saved = next((s for s in (x, weight, t) if s is not None), dy)
    dy, m = dy.to(saved.dtype), Member(weight, lora_a, lora_b, gate, None, seed, scale, t, needs)
    with torch.cuda.device(dy.device):
        u, grads = parameter_grads(dy, x, m, dropout_p)
        return grads._replace(x=dx_of(dy, u, m, dropout_p)) if needs.x else grads

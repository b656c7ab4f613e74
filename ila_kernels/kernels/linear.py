"""The masked LoRA linear on the Triton kernels; the same two functions as ``eager`` has.

forward    shrink, lowrank_gemm                       x read twice, y written once
backward   grad_out, lowrank_gemm, then dA            dy read twice, dx written once
"""

from __future__ import annotations

import torch
from torch import Tensor

from ila_kernels import eager
from ila_kernels.config import one_read_pays
from ila_kernels.device import target_of
from ila_kernels.eager import Grads, Needs
from ila_kernels.group import Member
from ila_kernels.kernels.grad_a import grad_a
from ila_kernels.kernels.grad_out import grad_out
from ila_kernels.kernels.launch import TL_DTYPES
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
) -> tuple[Tensor, Tensor]:
    """x (M, K), W (N, K), A (R, K), B (N, R) -> y (M, N) and t (M, R), both in the dtype of x."""
    check_dtype(x.dtype)
    with torch.cuda.device(x.device):
        (t,) = shrink(x, [lora_a], None if seed is None else [int(seed)], dropout_p)
        return lowrank_gemm(x, weight.t(), t, lora_b.t(), scale, gate, bias), t


def parameter_grads(
    dy: Tensor, x: Tensor | None, m: Member, t: Tensor | None, dropout_p: float, needs: Needs
) -> tuple[Tensor | None, Grads]:
    """u (M, R), for dx, and every wanted gradient but dx, from dy (M, N)."""
    dweight = dbias = da = db = dgate = u = None
    (n, r), both = m.lora_b.shape, needs.makes_u and needs.lora_b
    if both and one_read_pays(n, r, dy.element_size(), target_of(dy)):
        u, db, inner = grad_out(dy, m.lora_b, t, m.scale, m.gate, m.lora_b.dtype, needs.gate)
        dgate = inner.to(m.gate.dtype).reshape(m.gate.shape) if needs.gate else None
    elif needs.makes_u:
        (u,) = shrink(dy, [m.lora_b.t()])
    if needs.lora_a and m.seed is not None:
        da = grad_a(u, x, on_host(m.seed), dropout_p, m.scale, m.gate, m.lora_a.dtype)
    # What is left is one product of library GEMMs: nothing to fuse it with.
    rest = needs._replace(
        lora_a=needs.lora_a and da is None,
        lora_b=needs.lora_b and db is None,
        gate=needs.gate and dgate is None,
    )
    da_, db_, dgate_ = eager.adapter_grads(
        dy, x, u, t, m.lora_a, m.lora_b, m.gate, None, m.scale, 0.0, rest
    )
    if needs.weight:
        dweight = torch.mm(dy.t(), x)
    if needs.bias:
        dbias = dy.sum(0)
    da, db, dgate = (
        da_ if da is None else da,
        db_ if db is None else db,
        dgate_ if dgate is None else dgate,
    )
    return u, Grads(None, dweight, da, db, dgate, dbias)


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
) -> Grads:
    """All wanted gradients of ``forward`` from dy (M, N)."""
    saved = next((s for s in (x, weight, t) if s is not None), dy)
    dy, m = dy.to(saved.dtype), Member(weight, lora_a, lora_b, gate, None, seed, scale)
    with torch.cuda.device(dy.device):
        u, grads = parameter_grads(dy, x, m, t, dropout_p, needs)
        if not needs.x:
            return grads
        update = (u, lora_a, scale, gate, None, on_host(seed), dropout_p)
        return grads._replace(x=lowrank_gemm(dy, weight, *update))


def on_host(seed: Tensor | None) -> int | None:
    """The seed as an integer; its tensor lives on the CPU, so this waits for nothing."""
    return None if seed is None else int(seed)

"""The masked LoRA linear by both: library GEMMs for W, Triton kernels for the R-thin products.

    forward    t by ``shrink``, then the update t Bᵀ, and the base GEMM adds to it (β = 1)
    backward   u, dB and dγ by ``grad_out``, then γα u A, and dy W adds to it; then dA

Beside ``eager`` it reads dy once for u and dB, and x once for all of a group's A's, under dropout
too. Beside ``kernels`` it writes the R-thin product to y and dx once more, and needs no Triton GEMM
that is as fast as the library's.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ila_kernels.group import Member
from ila_kernels.kernels import linear
from ila_kernels.kernels.launch import seed_number
from ila_kernels.kernels.lowrank_gemm import lowrank_gemm
from ila_kernels.products import update_first


def masked_update(
    dy: Tensor, u: Tensor, m: Member, dropout_p: float, out: Tensor | None = None
) -> Tensor:
    """γα (u A) ⊙ keep/(1−p), (M, K) in the dtype of dy, added to ``out`` if there is one."""
    # The kernel's base product has an inner size of 0: its mask, without its GEMM.
    nothing, none = dy[:, :0], m.weight[:0]
    seed = seed_number(m.seed)
    options = (m.scale, m.gate, None, seed, dropout_p)
    return lowrank_gemm(nothing, none, u, m.lora_a, *options, out=out)


def input_grad(dy: Tensor, u: Tensor, m: Member, dropout_p: float) -> Tensor:
    """dx (M, K) = dy W + γα (u A) ⊙ keep/(1−p)."""
    if m.seed is None:
        return update_first(dy, m.weight, u, m.lora_a, m.scale, m.gate)
    return masked_update(dy, u, m, dropout_p).addmm_(dy, m.weight)


forward = partial(linear.forward, product=update_first)
backward = partial(linear.backward, dx_of=input_grad)

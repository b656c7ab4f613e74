"""Several masked LoRA linears of one x by both: ``hybrid`` with one read of x and one dx.

    forward    every t by one ``shrink``, then each yᵢ as in ``hybrid``
    backward   of each: u, dB and dγ by ``grad_out``; then Σ γα u A, and every dyᵢ Wᵢ adds to it;
               then every dA from one read of x

The two functions have the signatures of ``group``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ila_kernels.eager import Grads
from ila_kernels.group import NO_GRADS, Member, add_base_grads, stacked
from ila_kernels.hybrid import masked_update
from ila_kernels.kernels import group
from ila_kernels.kernels.linear import grads_of_a, parameter_grads
from ila_kernels.products import update_first


def _outputs(x: Tensor, members: Sequence[Member], ts: Sequence[Tensor]) -> list[Tensor]:
    """x (M, K) and every t (M, Rᵢ) of open members -> every y (M, Nᵢ) in the dtype of x."""
    return [
        update_first(x, m.weight.t(), t, m.lora_b.t(), m.scale, m.gate, m.bias)
        for m, t in zip(members, ts, strict=True)
    ]


forward = partial(group.forward, products=_outputs)


def _lowrank_dx(
    dys: Sequence[Tensor], us: Sequence[Tensor], members: Sequence[Member], dropout_p: float
) -> Tensor | None:
    """Σ γα (u A) ⊙ keep/(1−p), (M, K), over the members that have a u; ``None`` if none has."""
    rows = [(dy, u, m) for dy, u, m in zip(dys, us, members, strict=True) if u is not None]
    if dropout_p == 0.0:
        return torch.mm(*stacked([(u, m) for _, u, m in rows])) if rows else None
    dx = None
    for dy, u, m in rows:
        dx = masked_update(dy, u, m, dropout_p, out=dx)
    return dx


def backward(
    dys: Sequence[Tensor | None], x: Tensor | None, members: Sequence[Member], dropout_p: float
) -> tuple[Tensor | None, list[Grads]]:
    """Compute dx and the parameter gradients of every member (their ``Grads.x`` is None)."""
    saved = (x, *(m.weight for m in members), *(m.t for m in members), *dys)
    dtype = next((s.dtype for s in saved if s is not None), None)
    dys = [None if dy is None else dy.to(dtype) for dy in dys]
    used = [(dy, m) for dy, m in zip(dys, members, strict=True) if dy is not None]
    if not used:
        return None, [NO_GRADS] * len(members)
    us: list[Tensor | None] = []
    grads: list[Grads] = []
    with torch.cuda.device(used[0][0].device):
        for dy, m in zip(dys, members, strict=True):
            u, own = None, NO_GRADS
            if dy is not None:
                u, own = parameter_grads(dy, x, m, dropout_p, with_da=False)
            us.append(u)
            grads.append(own)
        dx = None
        if members[0].needs.x:
            dx = add_base_grads(_lowrank_dx(dys, us, members, dropout_p), used)
        das = grads_of_a(x, us, members, dropout_p)
    return dx, [own._replace(lora_a=da) for own, da in zip(grads, das, strict=True)]

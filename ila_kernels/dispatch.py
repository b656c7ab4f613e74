"""Run a checked call by its ``impl``: the specification, the op, or torch's own autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ila_kernels import eager, reference
from ila_kernels.dropout import keep_mask
from ila_kernels.group import Member
from ila_kernels.group_ops import MaskedLoraLinearGroupFunction, MemberTensors, absent
from ila_kernels.ops import LinearCall, MaskedLoraLinearFunction
from ila_kernels.quant import PackedWeight


def run_linear(call: LinearCall) -> Tensor:
    """Compute y (M, N) of one layer."""
    if call.impl == "reference":
        return _reference(call.x, call, call.dropout_p)
    packed = isinstance(call.weight, PackedWeight)
    compiling = torch.compiler.is_compiling() and not packed
    plain = call.impl == "eager" and call.gate is None and call.seed is None and not packed
    if plain and not compiling and eager.is_short(call.x):
        x, weight, lora_a, lora_b, bias = call.x, call.weight, call.lora_a, call.lora_b, call.bias
        return eager.short_forward(x, weight, lora_a, lora_b, bias, call.scale)
    if call.pre is not None:  # the gradient goes to pre and up directly
        call = call._replace(x=call.x.detach())
    if compiling:
        y, _t = torch.ops.ila.masked_lora_linear(*call)
        return y
    return MaskedLoraLinearFunction.apply(*call)


def run_group(
    x: Tensor, members: Sequence[Member], dropout_p: float, impl: str
) -> Sequence[Tensor]:
    """Compute every y (M, Nᵢ) of the layers of x (M, K)."""
    if impl == "reference":
        return [_reference(x, m, dropout_p) for m in members]
    packed = any(isinstance(m.weight, PackedWeight) for m in members)
    scales = [m.scale for m in members]
    if torch.compiler.is_compiling() and not packed:
        outputs = torch.ops.ila.masked_lora_linear_group(
            x,
            [m.weight for m in members],
            _present(x, [m.lora_a for m in members]),
            _present(x, [m.lora_b for m in members]),
            _present(x, [m.gate for m in members]),
            _present(x, [m.bias for m in members]),
            _one_tensor([m.seed for m in members]),
            scales,
            dropout_p,
            impl,
        )
        return outputs[: len(members)]
    flat = []
    for m in members:
        flat += MemberTensors(m.weight, m.lora_a, m.lora_b, m.gate, m.bias, m.seed)
    return MaskedLoraLinearGroupFunction.apply(impl, dropout_p, scales, x, *flat)


def _reference(x: Tensor, member: LinearCall | Member, dropout_p: float) -> Tensor:
    """Compute y (M, N) of x (M, K) by the specification."""
    m, weight = member, member.weight
    weight = weight.dense(x.dtype) if isinstance(weight, PackedWeight) else weight
    if m.lora_a is None:
        return F.linear(x, weight, m.bias)
    keep = None if m.seed is None else keep_mask(m.seed, *x.shape, dropout_p, x.device)
    adapter = (m.lora_a, m.lora_b, m.gate)
    return reference.masked_lora_linear(x, weight, *adapter, m.bias, m.scale, keep, dropout_p)


def _present(x: Tensor, column: Sequence[Tensor | None]) -> list[Tensor]:
    return [absent(x) if tensor is None else tensor for tensor in column]


def _one_tensor(seeds: Sequence[Tensor | None]) -> Tensor | None:
    """Join the seeds into (count,), as the op takes them; a closed member's is never read."""
    if all(seed is None for seed in seeds):
        return None
    unread = torch.zeros(1, dtype=torch.int64, device="cpu")
    return torch.cat([unread if seed is None else seed for seed in seeds])

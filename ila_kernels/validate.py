"""Checks of the public functions: each error names the argument, the expectation and the value.

One chain of comparisons on the hot path; a message is built only for an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from numbers import Real

import torch
from torch import Tensor

from ila_kernels.quant import PackedWeight


def check_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    scale: float,
    member: str = "",
) -> None:
    """Raise unless shapes, dtypes and devices of one masked LoRA linear fit together."""
    _check_base(x, weight, bias, member)
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        _check_tensor(name + member, tensor, x.device)
    n, k = weight.shape
    r = lora_a.shape[0] if lora_a.dim() == 2 else 0
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a{member} must have shape (R, {k}), got {tuple(lora_a.shape)}")
    if r == 0:
        raise ValueError(f"lora_a{member} must have rank R ≥ 1, got shape {tuple(lora_a.shape)}")
    if lora_b.shape != (n, r):
        raise ValueError(f"lora_b{member} must have shape ({n}, {r}), got {tuple(lora_b.shape)}")
    if gate is not None:
        _check_tensor("gate" + member, gate, x.device)
        if gate.numel() != 1 or gate.dim() > 1:
            raise ValueError(f"gate{member} must have shape () or (1,), got {tuple(gate.shape)}")
    if not isinstance(scale, (int, float, Real)):  # Real: NumPy's scalars
        raise TypeError(f"scale{member} must be a number, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale{member} must be finite, got {scale}")


def check_x(x: Tensor) -> None:
    """Raise unless x is a floating tensor of shape (..., K); all other checks compare with it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x must have shape (..., K), got a scalar")


def _check_base(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, member: str) -> None:
    packed = isinstance(weight, PackedWeight)
    if not packed:
        _check_tensor("weight" + member, weight, x.device)
    elif weight.device != x.device:
        raise ValueError(f"weight{member} must be on {x.device} like x, got {weight.device}")
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight{member} must have shape (N, {x.shape[-1]}) to fit x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if not packed and weight.dtype != x.dtype:
        raise TypeError(f"weight{member} must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if bias is not None:
        _check_tensor("bias" + member, bias, x.device)
        if bias.shape != (weight.shape[0],):
            raise ValueError(
                f"bias{member} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
        if not packed and bias.dtype != x.dtype:
            raise TypeError(f"bias{member} must have the dtype of x, {x.dtype}, got {bias.dtype}")


def _check_tensor(name: str, tensor: Tensor, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like x, got {tensor.device}")


def check_list(name: str, values: Sequence) -> None:
    """Raise unless ``values`` may hold an entry per member; a tensor has a length and may not."""
    if isinstance(values, Tensor) or not isinstance(values, Sized):
        raise TypeError(
            f"{name} must be a list with an entry for each member, got {type(values).__name__}"
        )


def check_group(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
) -> None:
    """Raise unless the lists have one length ≥ 1 and every member passes ``check_linear``.

    A member whose A and B are both ``None`` is closed and checked as the bare linear it is.
    """
    count = len(weights)
    if count == 0:
        raise ValueError("weights must hold at least one member, got none")
    lists = {"lora_as": lora_as, "lora_bs": lora_bs, "gates": gates}
    for name, values in (lists | {"biases": biases, "scales": scales}).items():
        check_list(name, values)
        if len(values) != count:
            raise ValueError(f"{name} must have {count} entries like weights, got {len(values)}")
    for i, row in enumerate(zip(weights, lora_as, lora_bs, gates, biases, scales, strict=True)):
        weight, a, b, gate, bias, scale = row
        if (a is None) != (b is None):
            raise ValueError(f"lora_as[{i}] and lora_bs[{i}] must both be tensors or both None")
        if a is None:
            if gate is not None:
                raise ValueError(f"gates[{i}] must be None: member {i} has no adapter")
            _check_base(x, weight, bias, f" of member {i}")
        else:
            check_linear(x, weight, a, b, gate, bias, scale, f" of member {i}")


ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def check_swiglu(pre: Tensor, up: Tensor, activation: str, x: Tensor | None = None) -> None:
    """Raise unless both are floating tensors of one dtype and of the shape of x."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    for name, tensor in (("pre", pre), ("up", up)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        _check_tensor(name, tensor, pre.device if x is None else x.device)
    if up.dtype != pre.dtype:
        raise TypeError(f"up must have the dtype of pre, {pre.dtype}, got {up.dtype}")
    if up.shape != pre.shape:
        raise ValueError(f"up must have shape {tuple(pre.shape)} like pre, got {tuple(up.shape)}")
    if x is not None and pre.shape != x.shape:
        raise ValueError(f"pre must have shape {tuple(x.shape)} like x, got {tuple(pre.shape)}")


def check_dropout(dropout_p: float, seed: Tensor | None, count: int) -> None:
    """Raise unless 0 ≤ p < 1 and the seed, if given, holds one int64 per member on the CPU."""
    if not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor, got {getattr(seed, 'dtype', type(seed))}")
    if seed.shape != (count,) or seed.device.type != "cpu":
        raise ValueError(
            f"seed must have shape ({count},) on cpu, got {tuple(seed.shape)} on {seed.device}"
        )

"""Autocast as ``F.linear`` knows it: x, W and bias are cast, adapters are rounded inside the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ila_kernels.quant import PackedWeight


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that ``F.linear`` would compute in; ``None`` if autocast casts nothing."""
    device_type = x.device.type
    # Asking whether autocast is on raises for device types that have none, such as meta.
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return None
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast a floating tensor; return anything else as it is, for the check that names it."""
    is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return tensor.to(dtype) if is_float else tensor


def outside_autocast(
    x: Tensor,
    dtype: torch.dtype,
    weights: Sequence[PackedWeight],
    call: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
) -> Tensor | tuple[Tensor, ...]:
    """Run ``call`` on x without autocast, as a packed linear of bitsandbytes does.

    x is rounded to autocast's dtype only where the weights would round it to the same; y has the
    dtype of x.
    """
    inner = x.to(dtype) if all(w.compute_dtype == dtype for w in weights) else x
    with torch.autocast(x.device.type, enabled=False):
        y = call(inner)
    return y.to(x.dtype) if isinstance(y, Tensor) else tuple(part.to(x.dtype) for part in y)

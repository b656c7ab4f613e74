"""The GPU of a tensor: its class, which is the key of the tables, and its multiprocessors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ila_kernels.choice import Call


def target_of(x: Tensor) -> str:
    """Name the GPU class of a tensor: ``"sm_90"``, ``"gfx942"``; ``"unknown"`` picks safe tiles."""
    return _target(x.device.index or 0) if x.is_cuda else "unknown"


def call_of(weight: Tensor, n: int, m: int | None, dtype: torch.dtype) -> Call | None:
    """Describe a call on W (·, K) for ``choice``, N out-features in all; ``None`` off the GPU."""
    if not weight.is_cuda:
        return None
    if torch.compiler.is_compiling():
        # Folded into the graph; a function with a cache would be a warning there.
        target = target_name(torch.cuda.get_device_properties(weight.device))
    else:
        target = target_of(weight)
    return Call(m, weight.shape[1], n, _NAMES.get(dtype, "this dtype"), target)


_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


def target_name(properties) -> str:
    """Name the GPU class in the properties of ``torch.cuda.get_device_properties``."""
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _target(index: int) -> str:
    return target_name(torch.cuda.get_device_properties(index))


@functools.cache
def multiprocessors(index: int) -> int:
    """Count the multiprocessors of a GPU: the programs of a persistent launch."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def is_capturing() -> bool:
    """Tell whether the current stream records a CUDA graph."""
    # A build of PyTorch without GPUs, under which kernels are emulated, cannot be asked.
    has_gpus = torch.version.cuda is not None or torch.version.hip is not None
    return has_gpus and torch.cuda.is_current_stream_capturing()

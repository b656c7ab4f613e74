"""The GPU of a tensor: its class, which is the key of the tables, and its multiprocessors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ila_kernels._version import __version__
from ila_kernels.choice import Call
from ila_kernels.verdict import Machine


def target_of(x: Tensor) -> str:
    """Name the GPU class of a tensor: ``"sm_90"``, ``"gfx942"``; ``"unknown"`` picks safe tiles."""
    return _target(x.device.index or 0) if x.is_cuda else "unknown"


def call_of(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor | None],
    m: int | None,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
) -> Call | None:
    """Describe a call on layers W (Nᵢ, K) with A (Rᵢ, K) for ``choice``; ``None`` off the GPU.

    In a compiled graph, which holds for any M, it stands for many rows.
    """
    if not weights[0].is_cuda:
        return None
    if torch.compiler.is_compiling():
        # Folded into the graph; a function with a cache would be a warning there.
        gpu = torch.cuda.get_device_properties(weights[0].device).name
        return call_on(gpu, weights, lora_as, None, dtype, dropout_p)
    return call_on(gpu_name(weights[0].device.index or 0), weights, lora_as, m, dtype, dropout_p)


def call_on(
    gpu: str,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor | None],
    m: int | None,
    dtype: torch.dtype,
    dropout_p: float,
) -> Call:
    """Describe a call as ``call_of`` does, on a GPU of this name."""
    adapted = [(w, a) for w, a in zip(weights, lora_as, strict=True) if a is not None]
    return Call(
        m,
        weights[0].shape[1],
        tuple([w.shape[0] for w, _ in adapted]),
        max((1, *[a.shape[0] for _, a in adapted])),
        dtype_name(dtype),
        dtype_name(adapted[0][1].dtype) if adapted else "none",
        dropout_p > 0.0,
        gpu,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as verdicts do: ``"bfloat16"``."""
    return _NAMES.get(dtype, "this dtype")


_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@functools.cache
def gpu_name(index: int) -> str:
    """Name a GPU as its driver does."""
    return torch.cuda.get_device_name(index)


def machine_of(device: torch.device) -> Machine:
    """Describe the machine that a measurement on ``device`` holds for."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return Machine(
        gpu=gpu_name(device.index if device.index is not None else torch.cuda.current_device()),
        driver=str(driver()) if driver is not None else "unknown",
        cuda=str(torch.version.cuda or torch.version.hip),
        torch=torch.__version__,
        triton=_version("triton"),
        library=__version__,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


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

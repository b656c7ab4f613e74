"""A GPU that is not there: Triton's own path of a launch, up to a driver that launches nothing.

Everything that the host does for a launch is real (arguments bound, specialised, looked up), except
for the compiler, which is not asked, and the last call into the driver. So launches, variants of a
kernel and host time can be counted on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from ila_kernels.kernels import (
    grad_a,
    grad_out,
    joined_gemm,
    launch,
    linear,
    lowrank_gemm,
    partials,
    shrink,
)

KERNELS = {
    "shrink": shrink._shrink,
    "lowrank_gemm": lowrank_gemm._lowrank_gemm,
    "joined_gemm": joined_gemm._joined_gemm,
    "grad_out": grad_out._grad_out,
    "grad_a": grad_a._grad_a,
    "sum_partials": partials._sum_partials,
}


class Nowhere:
    """A driver of one GPU that records launches as (kernel, grid, arguments)."""

    def __init__(self, capability: int):
        self.launches: list[tuple[str, tuple, tuple]] = []
        self.compiled: list[tuple] = []
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def compile(self, source: Any, **options: Any) -> CompiledKernel:
        """Stand in for ``triton.compile``."""
        name = source.fn.fn.__name__.removeprefix("_")
        constants = {
            source.fn.arg_names[place[0]]: value
            for place, value in source.constants.items()
            if len(place) == 1
        }
        several = [len(kind) for kind in source.signature.values() if isinstance(kind, tuple)]
        form = [constants.get(word) for word in ("DROPOUT", "ACCUMULATE", "q_k")]
        self.compiled.append((name, max(several, default=1), *form))
        kernel = object.__new__(_Kernel)
        kernel.src, kernel.name, kernel.module, kernel._module_pid = source, name, None, None
        kernel.function, kernel.packed_metadata = None, None
        kernel._run = lambda *call: self.launches.append((name, call[:3], call[9:]))
        return kernel


class _Kernel(CompiledKernel):
    run = property(lambda self: self._run)  # an attribute in older versions of Triton

    def _init_handles(self) -> None:
        pass


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch, capability: int = 90) -> Iterator[Nowhere]:
    """Take tensors on the CPU for tensors on a GPU, and launch nothing."""
    driver = Nowhere(capability)
    with monkeypatch.context() as patch:
        for module in (shrink, lowrank_gemm, joined_gemm, grad_out, grad_a, linear):
            patch.setattr(module, "target_of", lambda x: f"sm_{capability}")
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(triton.compiler, "compile", driver.compile)
        patch.setattr(launch, "_prepared", {})
        for kernel in KERNELS.values():
            patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
        triton.runtime.driver.set_active(driver)
        try:
            yield driver
        finally:
            triton.runtime.driver._active = None


class LibraryCalls(TorchDispatchMode):
    """Count the operators that would launch a kernel of a library: no views, no empty tensors.

    Nor the seeds of dropout, which are read on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        free = ("empty", "new_empty", "_unsafe_view", "_local_scalar_dense")
        if not func.is_view and not name.startswith(free):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

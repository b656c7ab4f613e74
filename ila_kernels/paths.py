"""The module that computes a call: library GEMMs, Triton kernels or both, for a layer or a group.

All of them offer ``forward`` and ``backward`` of the same signature. Triton is imported here, by
the first call that runs it, and a device proves itself before its first result is used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

from ila_kernels import eager, group
from ila_kernels.choice import gemm_form

P, T = ParamSpec("P"), TypeVar("T")


class PersistentPath:
    """The fused kernels with the persistent form of their GEMM, under any ``prefer``."""

    def __init__(self, path: ModuleType):
        self.forward, self.backward = _persistently(path.forward), _persistently(path.backward)


def _persistently(function: Callable[P, T]) -> Callable[P, T]:
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with gemm_form("persistent"):
            return function(*args, **kwargs)

    return run


def linear_path(impl: str) -> ModuleType | PersistentPath:
    """Return the module that computes one layer by ``impl``."""
    if impl == "eager":
        return eager
    if impl in ("triton", "persistent"):
        from ila_kernels.kernels import linear

        return linear if impl == "triton" else PersistentPath(linear)
    if impl == "hybrid":
        from ila_kernels import hybrid

        return hybrid
    raise ValueError(f"impl must be 'eager', 'hybrid', 'triton' or 'persistent' here, got {impl!r}")


def group_path(impl: str) -> ModuleType | PersistentPath:
    """Return the module that computes several layers of one x by ``impl``."""
    if linear_path(impl) is eager:
        return group
    if impl == "hybrid":
        from ila_kernels import hybrid_group

        return hybrid_group
    from ila_kernels.kernels import group as kernels_group

    return PersistentPath(kernels_group) if impl == "persistent" else kernels_group


def ensure_checked(impl: str, device: torch.device) -> None:
    """Raise unless kernels compute right results on ``device``; the check runs once.

    It belongs inside an op: a compiled graph does not run the public functions.
    """
    if impl != "eager":
        from ila_kernels.kernels import selfcheck

        form: AbstractContextManager[None] = nullcontext()
        if impl == "persistent":
            form = gemm_form("persistent")
        with form:
            selfcheck.ensure(device)

"""The module that computes a call: library GEMMs, Triton kernels or both, for a layer or a group.

All of them offer ``forward`` and ``backward`` of the same signature. Triton is imported here, by
the first call that runs it, and a device proves itself before its first result is used.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ila_kernels import eager, group


def linear_path(impl: str) -> ModuleType:
    """Return the module that computes one layer by ``impl``."""
    if impl == "eager":
        return eager
    if impl == "triton":
        from ila_kernels.kernels import linear

        return linear
    if impl == "hybrid":
        from ila_kernels import hybrid

        return hybrid
    raise ValueError(f"impl must be 'eager', 'hybrid' or 'triton' here, got {impl!r}")


def group_path(impl: str) -> ModuleType:
    """Return the module that computes several layers of one x by ``impl``."""
    if linear_path(impl) is eager:
        return group
    if impl == "hybrid":
        from ila_kernels import hybrid_group

        return hybrid_group
    from ila_kernels.kernels import group as kernels_group

    return kernels_group


def ensure_checked(impl: str, device: torch.device) -> None:
    """Raise unless kernels compute right results on ``device``; the check runs once.

    It belongs inside an op: a compiled graph does not run the public functions.
    """
    if impl != "eager":
        from ila_kernels.kernels import selfcheck

        selfcheck.ensure(device)

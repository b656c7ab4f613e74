"""Which implementation runs: a pure function of what the caller asked for.

``impl="auto"`` is the only word that may choose; every other word runs or raises.
"""

from __future__ import annotations

from typing import Literal

Impl = Literal["auto", "triton", "eager", "reference"]
IMPLS: tuple[str, ...] = ("auto", "triton", "eager", "reference")


def resolve_impl(impl: str, device_type: str) -> tuple[str, str]:
    """Choose the implementation of one call and say why.

    Args:
        impl: One of ``"auto"``, ``"triton"``, ``"eager"``, ``"reference"``.
        device_type: Type of the device that holds the tensors, e.g. ``"cpu"`` or ``"cuda"``.

    Returns:
        The implementation that runs (never ``"auto"``) and the reason in words.

    Raises:
        ValueError: If ``impl`` is not one of the four words.
        RuntimeError: If ``impl="triton"``: this version ships no Triton kernels.

    >>> resolve_impl("auto", "cpu")
    ('eager', 'auto: library GEMM + addmm; no fused kernel for device type cpu')
    >>> resolve_impl("reference", "cuda")
    ('reference', 'asked for')
    """
    if impl == "auto":
        return "eager", f"auto: library GEMM + addmm; no fused kernel for device type {device_type}"
    if impl == "triton":
        raise RuntimeError(
            "impl='triton' was asked for, but this version has no Triton kernels; "
            "use impl='auto' or impl='eager'"
        )
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    return impl, "asked for"

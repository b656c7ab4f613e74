"""The choice of ``impl="auto"`` on a GPU: a pure function of the call and of measurements.

In this order: the value of ``prefer``, a verdict measured on this machine, a verdict shipped with
the library, eager. This module measures nothing and reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from ila_kernels.verdict import Verdict, Verdicts, key_of

TRITON_DTYPES = ("bfloat16", "float16", "float32")
# Measurements of GPUs that we had: the `rows` that `make gpu-day` writes. Empty: none has been
# measured, so `auto` stays on the library's GEMMs on a machine that was not tuned.
MEASURED: tuple[Verdict, ...] = ()
NONE, SHIPPED = Verdicts(), Verdicts(MEASURED)


class Call(NamedTuple):
    """One call on a GPU: the layers of one x; ``m=None`` stands for many rows.

    ``ns`` are the N of the layers that have an adapter, ``r`` is the largest of their ranks.
    """

    m: int | None
    k: int
    ns: tuple[int, ...]
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool
    gpu: str


@dataclass(frozen=True)
class Preference:
    """The caller's choice, which replaces the measurements; ``None`` leaves it to them."""

    auto: str | None = None
    gemm: str | None = None


_preference = Preference()
_verdicts = NONE
_gemm: ContextVar[str | None] = ContextVar("gemm", default=None)


def prefer(*, auto: str | None = None, gemm: str | None = None) -> None:
    """Set the choice of ``impl="auto"`` on a GPU and the form of the Triton GEMM, process-wide.

    It applies to every later call, backward passes included, and ``prefer()`` goes back to the
    measurements. Set it before ``torch.compile`` traces a model.

    Args:
        auto: ``"triton"`` or ``"hybrid"``: these wherever they can run. ``"eager"``: library GEMMs
            everywhere. ``None``: by measurement (``tune``), which without one means eager.
        gemm: ``"persistent"``: tensor descriptors and persistent programs, on sm_90 and newer and
            where the operands' alignment allows them. ``"pointer"``: never. ``None``: by
            measurement, which without one means pointers.

    Raises:
        ValueError: If a word is not one of these.

    >>> prefer(auto="triton")
    >>> preference()
    Preference(auto='triton', gemm=None)
    >>> prefer()
    """
    global _preference
    if auto not in (None, "eager", "hybrid", "triton"):
        raise ValueError(f"auto must be 'eager', 'hybrid', 'triton' or None, got {auto!r}")
    if gemm not in (None, "pointer", "persistent"):
        raise ValueError(f"gemm must be 'pointer', 'persistent' or None, got {gemm!r}")
    _preference = Preference(auto, gemm)


@contextmanager
def nothing_preferred() -> Iterator[None]:
    """Suspend ``prefer``, so that every implementation is itself."""
    global _preference
    before, _preference = _preference, Preference()
    try:
        yield
    finally:
        _preference = before


def preferred() -> Preference:
    """Return the arguments of the last call of ``prefer``; compilers can trace this."""
    return _preference


def preference() -> Preference:
    """Return the preference for a kernel: of ``prefer``, or of ``gemm_form`` around its launch."""
    gemm = _gemm.get()
    return _preference if gemm is None else Preference(_preference.auto, gemm)


@contextmanager
def gemm_form(gemm: str) -> Iterator[None]:
    """Prefer a form of the Triton GEMM inside the ``with``, in this thread only."""
    token = _gemm.set(gemm)
    try:
        yield
    finally:
        _gemm.reset(token)


def set_verdicts(verdicts: Verdicts) -> None:
    """Let ``impl="auto"`` choose by these verdicts from now on."""
    global _verdicts
    _verdicts = verdicts


def verdicts_in_use() -> Verdicts:
    """Return the verdicts by which ``impl="auto"`` chooses."""
    return _verdicts


def gpu_impl(
    call: Call, prefers: Preference = Preference(), verdicts: Verdicts = NONE
) -> tuple[str, str]:
    """Choose among the candidates of ``verdict`` on a GPU and say why.

    A group that was not measured as one is decided by its widest layer alone.

    >>> call = Call(8192, 4096, (4096,), 16, "bfloat16", "float32", False, "a GPU")
    >>> gpu_impl(call)
    ('eager', 'not measured on a GPU yet, as ila_kernels.tune() does')
    >>> gpu_impl(call, Preference(auto="triton"))
    ('triton', "ila_kernels.prefer(auto='triton')")
    """
    if call.dtype not in TRITON_DTYPES:
        return "eager", f"no fused kernel for {call.dtype}"
    if prefers.auto is not None:
        return prefers.auto, f"ila_kernels.prefer(auto={prefers.auto!r})"
    for known in (verdicts, SHIPPED):
        for ns in (call.ns, (max((0, *call.ns)),)):
            kind = key_of(call.k, ns, call.r, call.dtype, call.adapter_dtype, call.dropout)
            picked = known.find(call.gpu, kind, call.m)
            if picked is not None:
                return picked.pointer_only if prefers.gemm == "pointer" else picked.any_form
    return "eager", f"not measured on {call.gpu} yet, as ila_kernels.tune() does"

"""The choice of ``impl="auto"`` on a GPU: a pure function of call, target and measurement.

Forward and backward by library GEMMs + addmm move e·(3·M·N + 2·M·K) bytes more than the fused
kernels (`roofline`), which take B⁻¹ seconds each; the fused ones do the 4·M·N·K FLOPs of y and dx
with a GEMM that takes ρ times as long as the library's, F⁻¹ seconds each. Fusing pays where

    (ρ − 1) · 4·N·K / F  <  e · (3·N + 2·K) / B

for R → 0 (at R = 16, N = K the fused kernels' own sums over programs take back 6 %). M cancels: it
matters only through launches, which dominate at few rows. ``benchmarks/tune.py`` measures ρ, F/B
and the least number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPES_16BIT = ("bfloat16", "float16")
TRITON_DTYPES = (*DTYPES_16BIT, "float32")


@dataclass(frozen=True)
class Call:
    """One layer's call on a GPU; ``m=None`` stands for many rows, where no call is at hand."""

    m: int | None
    k: int
    n: int
    dtype: str
    target: str


@dataclass(frozen=True)
class Measured:
    """The measurement of one GPU class in 16 bits.

    Attributes:
        gemm_ratio: ρ, time of the Triton GEMM over that of the library's.
        flop_per_byte: F/B, FLOP/s of the library's GEMM over the bytes/s of a copy.
        least_rows: M from which the fused forward is no slower than addmm's.
        source: GPU, versions and date.
    """

    gemm_ratio: float
    flop_per_byte: float
    least_rows: int
    source: str


# By target, as `benchmarks/tune.py` prints them. Empty: no GPU has been measured, so `auto` stays
# on the library's GEMMs everywhere unless `prefer` says otherwise.
MEASURED: dict[str, Measured] = {}


@dataclass(frozen=True)
class Preference:
    """The caller's choice, which replaces the tables; ``None`` leaves the choice to them."""

    auto: str | None = None
    gemm: str | None = None


_preference = Preference()


def prefer(*, auto: str | None = None, gemm: str | None = None) -> None:
    """Set the choice of ``impl="auto"`` on a GPU and the form of the Triton GEMM, process-wide.

    The defaults hold only what was measured; ``prefer`` lets you try the rest. It applies to every
    later call, backward passes included, and ``prefer()`` goes back to the defaults. Set it before
    ``torch.compile`` traces a model.

    Args:
        auto: ``"triton"`` or ``"hybrid"``: these wherever they can run. ``"eager"``: library GEMMs
            everywhere. ``None``: by measurement, which without one means eager.
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


def preference() -> Preference:
    """Return the arguments of the last call of ``prefer``."""
    return _preference


def most_gemm_ratio(k: int, n: int, flop_per_byte: float, element_bytes: int = 2) -> float:
    """Return ρ at which fused and addmm break even: a slower Triton GEMM costs more than it saves.

    >>> round(most_gemm_ratio(4096, 4096, 295.0), 3)
    1.18
    """
    return 1.0 + element_bytes * flop_per_byte * (3 * n + 2 * k) / (4 * n * k)


def gpu_impl(
    call: Call, preferred: str | None = None, measured: dict[str, Measured] = MEASURED
) -> tuple[str, str]:
    """Choose between ``"eager"`` and ``"triton"`` on a GPU and say why.

    >>> gpu_impl(Call(8192, 4096, 4096, "bfloat16", "sm_90"))
    ('eager', 'no measurement yet of the fused kernels on sm_90')
    >>> gpu_impl(Call(8192, 4096, 4096, "bfloat16", "sm_90"), preferred="triton")
    ('triton', "ila_kernels.prefer(auto='triton')")
    """
    if call.dtype not in TRITON_DTYPES:
        return "eager", f"no fused kernel for {call.dtype}"
    if preferred is not None:
        return preferred, f"ila_kernels.prefer(auto={preferred!r})"
    if call.target not in measured:
        return "eager", f"no measurement yet of the fused kernels on {call.target}"
    if call.dtype not in DTYPES_16BIT:
        return "eager", f"the fused kernels are measured in 16 bits only, not in {call.dtype}"
    if 0 in (call.k, call.n):
        return "eager", "no products to fuse"
    row = measured[call.target]
    if call.m is not None and call.m < row.least_rows:
        return "eager", f"{call.m} rows, and launches dominate below {row.least_rows}"
    most = most_gemm_ratio(call.k, call.n, row.flop_per_byte)
    ratio = f"the Triton GEMM takes {row.gemm_ratio:.2f} of the library's time on {call.target}"
    if row.gemm_ratio >= most:
        return "eager", f"{ratio}, and fusing pays below {most:.2f} at K = {call.k}, N = {call.n}"
    rows = "" if call.m is not None else f" from {row.least_rows} rows"
    return "triton", f"{ratio}, and fusing pays{rows} below {most:.2f}"

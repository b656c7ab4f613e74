"""FLOPs and HBM bytes of a masked LoRA linear, and the least time that a GPU allows.

FLOPs count the GEMMs, 2 per multiply-add. Bytes count a tensor once for each kernel that reads or
writes it: programs of one kernel that read the same tensor are assumed to find it in a cache. Casts
of A and B, scalars, the bias and element-wise work on (M, R) are left out. Extra elements over the
bare linear for R → 0, one dtype, no dropout, with dx, dA and dB wanted:

    frozen   x Wᵀ + bias                                  forward 0          backward 0
    peft     base + B(A(dropout(x)))·s                    M·K + 6·M·N        5·M·K + 4·M·N
    addmm    `ila_kernels.eager`                          M·K + 2·M·N        3·M·K + 2·M·N
    hybrid   our thin kernels, then the library's GEMM    M·K + 2·M·N        3·M·K + M·N
    fused    one GEMM x Wᵀ + t Bᵀ, one read of dy         M·K                M·K + M·N

Of several linears of one x the fused kernels read x twice: for every t, and for every output;
hybrid reads it once for every t, and once for each output.

R is small, but our kernels leave fp32 shares of their sums: u from every 256 columns of dy,
dB and dA from every 256 to 1024 rows. At M = 8192, N = 4096, R = 16 the shares of u and dB add 38 %
to the M·N of the one read of dy; sharing that read saves 100 %.

With fp32 adapters over a 16-bit base peft's low-rank branch lives in fp32: x is copied to it, and
its (M, N) tensors are twice as wide. With dropout addmm redraws the mask in backward and saves no
x̂: less memory than peft, more traffic. peft has no gate, frozen no adapter: a gradient of a
parameter that a contestant does not have costs it nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ila_kernels.config import (
    ADAPTERS_PER_PASS,
    one_read_pays,
    own_grad_a,
    rows_per_program,
    shrink_shares,
)

CONTESTANTS: tuple[str, ...] = ("frozen", "peft", "addmm", "hybrid", "fused")
# Those whose R-thin products are our kernels.
_KERNELS = ("hybrid", "fused")
PARAMETERS = frozenset({"x", "weight", "lora_a", "lora_b", "gate", "bias"})


@dataclass(frozen=True)
class Problem:
    """One layer: M tokens, K in-features, N out-features, rank R, widths of the dtypes, dropout.

    ``block_n``: columns of dy in one program of ``grad_out``, from ``config.grad_tile``.
    """

    m: int
    k: int
    n: int
    r: int
    base_bytes: int = 2
    adapter_bytes: int = 4
    dropout: bool = False
    block_n: int = 256

    @property
    def masked_copy_bytes(self) -> int:
        """Count bytes per element of a masked copy: mask written and read, x read, x̂ written."""
        return 2 + 2 * self.base_bytes if self.dropout else 0


@dataclass(frozen=True)
class Cost:
    """FLOPs of the GEMMs and bytes moved."""

    flops: int
    bytes: int


def forward_cost(contestant: str, p: Problem) -> Cost:
    """Count one forward.

    >>> forward_cost("addmm", Problem(m=1, k=1, n=1, r=1)).flops
    6
    """
    _check(contestant, set())
    mk, mn, mr, kn, rkn = p.m * p.k, p.m * p.n, p.m * p.r, p.k * p.n, p.r * (p.k + p.n)
    e, a = p.base_bytes, p.adapter_bytes
    flops, moved = 2 * p.m * kn, e * (mk + kn + mn)
    if contestant == "frozen":
        return Cost(flops, moved)
    if contestant == "peft":
        # A and B, then ·s (read, write), then + (two reads, a write in the wider dtype).
        moved += a * (mk + 2 * mr + rkn + 4 * mn) + (e + max(a, e)) * mn
        moved += (e + a) * (mk + mn) if a != e else 0  # x to the branch, y back from it
        moved += (2 * a + 1) * mk if p.dropout else 0
    else:
        moved += e * (mk + 2 * mr) + a * rkn
        moved += 2 * e * mn if contestant != "fused" else 0  # the update, before or after the GEMM
        moved += _shrink_shares(p, p.k) if contestant in _KERNELS else p.masked_copy_bytes * mk
    return Cost(flops + 2 * p.m * rkn, moved)


def backward_cost(contestant: str, p: Problem, needs: AbstractSet[str]) -> Cost:
    """Count one backward that computes the gradients of ``needs``, a subset of ``PARAMETERS``."""
    _check(contestant, needs)
    mk, mn, kn = p.m * p.k, p.m * p.n, p.k * p.n
    gemms = len(needs & {"x", "weight"})
    flops, moved = 2 * p.m * kn * gemms, p.base_bytes * (mk + kn + mn) * gemms
    moved += p.base_bytes * mn if "bias" in needs else 0
    if contestant == "frozen":
        return Cost(flops, moved)
    if contestant == "peft":
        needs = needs - {"gate"}
    makes_u = bool(needs & {"x", "lora_a", "gate"})
    flops += 2 * p.m * p.r * p.k * len(needs & {"x", "lora_a"})
    flops += 2 * p.m * p.r * p.n * (makes_u + ("lora_b" in needs))
    if contestant == "hybrid" and "x" in needs:  # γα u A is written, and read by the GEMM
        moved += 2 * p.base_bytes * mk
    extra = {"peft": _peft_extra, "addmm": _addmm_extra}.get(contestant, _kernels_extra)
    return Cost(flops, moved + extra(p, needs))


def _peft_extra(p: Problem, needs: AbstractSet[str]) -> int:
    mk, mn, mr, rk, rn = p.m * p.k, p.m * p.n, p.m * p.r, p.r * p.k, p.r * p.n
    e, a = p.base_bytes, p.adapter_bytes
    casts, moved = int(a != e), 0
    if needs & {"x", "lora_a", "lora_b"}:  # ·s, after dy is cast to the branch
        moved += 2 * a * mn + casts * (e + a) * mn
    # dB reads dy and t, dt reads dy and B.
    moved += a * (mn + mr + rn) * (("lora_b" in needs) + bool(needs & {"x", "lora_a"}))
    moved += a * (mk + mr + rk) if "lora_a" in needs else 0
    if "x" in needs:  # dx of the branch, of dropout, its cast, and the sum of two dx
        moved += a * (mk + mr + rk) + p.dropout * (2 * a + 1) * mk
        moved += casts * (e + a) * mk + 3 * e * mk
    return moved


def _addmm_extra(p: Problem, needs: AbstractSet[str]) -> int:
    mk, mn, mr, rk, rn = p.m * p.k, p.m * p.n, p.m * p.r, p.r * p.k, p.r * p.n
    e, a = p.base_bytes, p.adapter_bytes
    makes_u = bool(needs & {"x", "lora_a", "gate"})
    moved = (e * (mn + mr) + a * rn) * (makes_u + ("lora_b" in needs))
    moved += 2 * e * mr if "gate" in needs else 0
    if "x" in needs:  # in place; with dropout u A is written, masked, and added from there
        moved += e * (2 * mk + mr) + a * rk + (p.masked_copy_bytes + p.dropout * 2 * e) * mk
    return moved + (e * (mk + mr) + a * rk + p.masked_copy_bytes * mk if "lora_a" in needs else 0)


def _kernels_extra(p: Problem, needs: AbstractSet[str]) -> int:
    mk, mn, mr, rk, rn = p.m * p.k, p.m * p.n, p.m * p.r, p.r * p.k, p.r * p.n
    e, a, moved = p.base_bytes, p.adapter_bytes, 0
    makes_u = bool(needs & {"x", "lora_a", "gate"})
    # Sums over M and N are left in shares of 4 bytes, written once and read once.
    stretches, columns = -(-p.m // rows_per_program(p.m, p.n)), -(-p.n // p.block_n)
    if makes_u and "lora_b" in needs and one_read_pays(p.n, p.r, e, p.block_n):
        moved += e * (mn + 2 * mr) + 2 * a * rn + 8 * (columns * mr + stretches * rn)
        moved += e * mr if "gate" in needs else 0  # t again, beside the sum of u's shares
    else:
        moved += (e * (mn + mr) + a * rn) * (makes_u + ("lora_b" in needs))
        moved += _shrink_shares(p, p.n) * makes_u
    moved += e * mr + a * rk if "x" in needs else 0
    if "lora_a" in needs:
        stretches = -(-p.m // rows_per_program(p.m, p.k)) * own_grad_a(p.r, e, p.dropout)
        moved += e * (mk + mr) + a * rk + 8 * stretches * rk
    return moved


def _shrink_shares(p: Problem, columns: int) -> int:
    """Bytes of the shares that ``shrink`` leaves where it splits its sum over ``columns``."""
    parts = shrink_shares(p.m, columns, p.r)
    return 8 * parts * p.m * p.r if parts > 1 else 0


def group_forward_cost(contestant: str, members: Sequence[Problem]) -> Cost:
    """Count one forward of several linears of one x, which differ in N and R only.

    Ours read x once for every t. Under dropout only the kernels do: a mask of its own is one more
    register tile there, and a copy of x in library calls.
    """
    first, passes = members[0], len(members)
    if contestant in _KERNELS:
        passes = -(-passes // ADAPTERS_PER_PASS)
    elif contestant == "addmm" and not first.dropout:
        passes = 1
    saved = first.base_bytes * first.m * first.k * (len(members) - passes)
    # x for the products of W too, where one launch makes all outputs (wider than half a tile).
    saved *= 2 if contestant == "fused" and first.m and all(p.n > 64 for p in members) else 1
    costs = [forward_cost(contestant, p) for p in members]
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs) - saved)


def group_backward_cost(
    contestant: str, members: Sequence[Problem], needs: AbstractSet[str]
) -> Cost:
    """Count one backward of several linears of one x that all want the gradients of ``needs``.

    Ours accumulate one dx and read x once for every dA, addmm without dropout only. Without dropout
    the library writes γα u A of all members by one product.
    """
    first, more = members[0], len(members) - 1
    costs = [backward_cost(contestant, p, needs) for p in members]
    mk = first.base_bytes * first.m * first.k * more
    extra, ours = 0, contestant in ("addmm", *_KERNELS)
    if "x" in needs:  # every dy W into one dx that is read again; else autograd adds two and two
        extra += mk if ours else 3 * mk
        one_update = contestant in ("addmm", "hybrid") and not first.dropout
        extra -= 2 * mk if one_update else 0
    by_kernels = contestant in _KERNELS
    own = by_kernels and all(own_grad_a(p.r, p.base_bytes, p.dropout) for p in members)
    if "lora_a" in needs and own:
        passes = -(-len(members) // ADAPTERS_PER_PASS)
        extra -= first.base_bytes * first.m * first.k * (len(members) - passes)
    elif "lora_a" in needs and ours and more and not first.dropout:  # every u beside the others
        extra += 2 * first.base_bytes * sum(p.m * p.r for p in members) - mk
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs) + extra)


def saved_bytes(contestant: str, p: Problem, needs: AbstractSet[str]) -> int:
    """Count the bytes of activations that one forward keeps for backward.

    ``addmm``, ``hybrid`` and ``fused`` keep x where dA or dW reads it, and t (M, R) for dB and dγ;
    a dropout mask is drawn again. ``peft`` keeps its branch's own x (a copy in the adapters'
    dtype), and with dropout the mask (1 byte an element, as on a GPU) and x̂. dx of a frozen linear
    reads W alone.

    >>> saved_bytes("addmm", Problem(m=2, k=8, n=8, r=1), {"x", "lora_a", "lora_b"})
    36
    """
    _check(contestant, needs)
    mk, mr, e, a = p.m * p.k, p.m * p.r, p.base_bytes, p.adapter_bytes
    if contestant == "frozen":
        return e * mk * ("weight" in needs)
    if contestant != "peft":
        return e * mk * bool(needs & {"lora_a", "weight"}) + e * mr * bool(
            needs & {"lora_b", "gate"}
        )
    own_x = "lora_a" in needs and (a != e or p.dropout)
    saved = e * mk * ("weight" in needs or ("lora_a" in needs and not own_x))
    saved += a * mk * own_x + mk * (p.dropout and "x" in needs)
    return saved + a * mr * ("lora_b" in needs)


def _check(contestant: str, needs: AbstractSet[str]) -> None:
    if contestant not in CONTESTANTS:
        raise ValueError(f"contestant must be one of {CONTESTANTS}, got {contestant!r}")
    if not needs <= PARAMETERS:
        raise ValueError(f"needs must be among {sorted(PARAMETERS)}, got {sorted(needs)}")


@dataclass(frozen=True)
class Ceiling:
    """A GPU's peaks in its vendor's data sheet: bf16 without sparsity, and memory."""

    bf16_tflops: float
    memory_gb_s: float


# By the name that the driver gives, whole: an L40S is no L4, an H100 PCIe no H100 SXM.
CEILINGS: dict[str, Ceiling] = {
    "NVIDIA A100-SXM4-80GB": Ceiling(312.0, 2039.0),
    "NVIDIA H100 80GB HBM3": Ceiling(989.4, 3350.0),
    "NVIDIA H200": Ceiling(989.4, 4800.0),
    "NVIDIA L4": Ceiling(121.0, 300.0),
    "NVIDIA GeForce RTX 4090": Ceiling(165.2, 1008.0),
    "AMD Instinct MI300X": Ceiling(1307.4, 5300.0),
}


def ceiling_of(device_name: str) -> Ceiling | None:
    """Look up ``torch.cuda.get_device_name()``; ``None`` for a GPU that is not listed."""
    return CEILINGS.get(device_name.strip())


def time_bound_ms(flops: float, moved_bytes: float, ceiling: Ceiling) -> float:
    """Compute the least time: traffic and arithmetic overlap, and every FLOP runs at bf16 speed."""
    return max(flops / ceiling.bf16_tflops / 1e9, moved_bytes / ceiling.memory_gb_s / 1e6)

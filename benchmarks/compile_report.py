"""Compile every kernel ahead of time, without a GPU, and report what the compiler made of it.

    python -m benchmarks.compile_report                                 the whole table
    python -m benchmarks.compile_report --target sm_90 --kernel dx      a part of it
    python -m benchmarks.compile_report --json FILE                     write {"rows": [...], ...}

A row is one launch as the library would make it at M = 8192, K = N = 4096 with fp32 adapters,
a gate and a bias. ``loop_instructions`` is the length of the main loop: of all the loops in the
machine code the one with the most tensor-core instructions (or FMAs, where fp32 uses none). For the
GEMM, ``plain_loop_instructions`` is that of the same kernel with the low-rank part compiled out.
Of a group, ``+2`` and ``+3`` are the adapters in one pass over x, and ``+add`` adds to the dx of
other members. ``+tma`` is the persistent form of the GEMM, and ``tma_loads`` counts the
instructions that load a descriptor's block.
``copies_ahead`` are the groups of copies into shared memory that the main loop leaves on their way
when it waits: with 0 it has waited for its own load, as long as that takes, in every step.
``spills`` counts instructions that move registers to or from local memory. ``occupancy`` is the
share of a multiprocessor's warps that registers and shared memory let in.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ila_kernels.config import GEMM_PERSISTENT, SHARED_LIMIT_BYTES, prefetches
from ila_kernels.group import Member
from ila_kernels.kernels import grad_a, grad_out, joined_gemm, lowrank_gemm, partials, shrink
from ila_kernels.kernels.launch import Launch

M, K, N = 8192, 4096, 4096
RANKS = (8, 16, 64, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Compared with the plain GEMM; with dropout the tile is another one than that has.
MARKED = ("forward", "forward+2", "forward+3", "dx", "forward+tma", "dx+tma")
KERNELS = (
    "shrink",
    "shrink+dropout",
    "shrink+2",
    "shrink+2+dropout",
    "shrink+3",
    "shrink+3+dropout",
    "forward",
    "forward+2",
    "forward+3",
    "dx",
    "dx+dropout",
    "dx+add",
    "dx+dropout+add",
    "forward+tma",
    "dx+tma",
    "dx+dropout+tma",
    "dx+add+tma",
    "dx+dropout+add+tma",
    "grad_out",
    "grad_a",
    "grad_a+2",
    "grad_a+3",
    "grad_a+dropout",
    "grad_a+2+dropout",
    "grad_a+3+dropout",
    "sum_partials",
)


def gpu_of(target: str) -> GPUTarget:
    """Describe a target to Triton: ``"sm_103"``, ``"gfx90a"``."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    # gfx9 is CDNA, with 64 lanes in a wave; the gaming GPUs have 32.
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


@dataclass(frozen=True)
class Limits:
    """A target and what one of its multiprocessors has."""

    gpu: GPUTarget
    shared_per_sm: int
    registers: int
    warps: int


TARGETS = {
    "sm_80": Limits(gpu_of("sm_80"), 164 * 1024, 65536, 64),
    "sm_90": Limits(gpu_of("sm_90"), 228 * 1024, 65536, 64),
    "sm_100": Limits(gpu_of("sm_100"), 228 * 1024, 65536, 64),
    "sm_120": Limits(gpu_of("sm_120"), 100 * 1024, 65536, 48),
    # 4 SIMDs of 512 registers a lane and 8 waves each.
    "gfx942": Limits(gpu_of("gfx942"), 64 * 1024, 4 * 512 * 64, 32),
}


@dataclass(frozen=True)
class Row:
    """One launch on one target."""

    kernel: str
    dtype: str
    r: int
    tile: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    shared_limit_bytes: int
    tensor_core_instructions: int
    tma_loads: int
    loop_instructions: int
    plain_tensor_core_instructions: int | None
    plain_loop_instructions: int | None
    occupancy: float
    copies_ahead: int | None


def make_launch(
    kernel: str, dtype: torch.dtype, r: int, target: str, plain: bool = False
) -> Launch:
    """Return the library's own launch of ``kernel``, on tensors without data."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.float32
    x, dy, w, thin = empty(M, K), empty(M, N), empty(N, K), empty(M, r)
    a, b, gate = empty(r, K, dtype=wide), empty(N, r, dtype=wide), empty(1, dtype=wide)
    name, *options = kernel.split("+")
    seed, p = (2**40, 0.1) if "dropout" in options else (None, 0.0)
    if name == "shrink":
        members = next((int(word) for word in options if word.isdigit()), 1)
        seeds = [seed] * members if seed else None
        return shrink.launch(x, [a] * members, [thin] * members, seeds, p, target)
    if name == "forward" and options and options[0].isdigit() and not plain:
        ranks, members = [thin] * int(options[0]), [Member(w, a, b, gate, empty(N), None, 2.0)]
        outs = [empty(M, N)] * len(ranks)
        return joined_gemm.launch(x, members * len(ranks), ranks, outs, target)
    if name in ("forward", "dx"):
        update = (thin, b.t()) if name == "forward" else (thin, a)
        u, v = (None, None) if plain else update
        gate = None if plain else gate
        # Any number of programs: it is an argument of the launch and not of the kernel.
        form = {"target": target, "programs": 1 if "tma" in options else None}
        form["accumulate"] = "add" in options
        if name == "forward":
            bias, y = empty(N), empty(M, N)
            return lowrank_gemm.launch(x, w.t(), u, v, y, 2.0, gate, bias, None, 0, **form)
        return lowrank_gemm.launch(dy, w, u, v, empty(M, K), 2.0, gate, None, seed, p, **form)
    if name == "grad_out":
        return grad_out.launch(dy, b, thin, *grad_out.shares(dy, r, target), target)
    if name == "grad_a":
        members = next((int(word) for word in options if word.isdigit()), 1)
        seeds, shares = [seed] * members if seed else None, [empty(8, r, K, dtype=wide)] * members
        return grad_a.launch([thin] * members, x, shares, seeds, p, target)
    if name == "sum_partials":
        u = partials.Sum(empty(8, M, r, dtype=wide), dtype, t=thin)
        db = partials.Sum(empty(8, N, r, dtype=wide), wide, 2.0, gate)
        return partials.launch([u, db], [thin, b], [empty(M, dtype=wide), None])
    raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")


SCALARS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compiled(launch: Launch, gpu: GPUTarget) -> triton.compiler.CompiledKernel:
    """Compile as the runtime would: its specialisation on 1 and on multiples of 16 included."""
    signature, constants, attributes = {}, {}, {}

    def described(value: object, place: tuple[int, ...], special: bool) -> str | tuple:
        """Type of an argument; of a tuple, that of each."""
        if isinstance(value, tuple):
            return tuple(described(v, (*place, i), special) for i, v in enumerate(value))
        if value is None or (special and type(value) is int and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{SCALARS[value.base.dtype]}{list(value.block_shape)}>"
        if isinstance(value, float):
            return "fp32"
        if special and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return "*" + SCALARS[value.dtype]
        return "i32" if value < 2**31 else "i64"

    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = described(value, (i,), not parameter.do_not_specialize)
    options = {
        "num_warps": launch.tile.warps,
        "num_stages": launch.tile.stages,
        "enable_fp_fusion": True,
    }
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=options)


TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|QMMA|OMMA|v_s?mfma\w*|v_wmma\w*)\b")
COPY = re.compile(r"\bLDGSTS\b")
WAIT = re.compile(r"\bDEPBAR\.LE SB\d, (0x[0-9a-f]+)")
FMA = re.compile(r"\b(FFMA2?|v_(?:pk_)?fma\w*)\b")
TMA_LOAD = re.compile(r"\bUTMALDG\b")
SPILL = re.compile(r"\b(STL|LDL|scratch_(?:load|store)\w*)\b")
LABEL = re.compile(r"^(\.L\w+):")
BRANCH = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)")


def instructions(assembly: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Return the instructions of SASS or amdgcn text, and where each label points."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly:
        text = re.sub(r"^\s*/\*[0-9a-f]+\*/\s*", "", line).strip()
        if label := LABEL.match(text):
            labels[label[1]] = len(found)
        elif text and text[0] not in "./;" and (text[0].isalpha() or text[0] == "@"):
            found.append(text)
    return found, labels


def main_loop(assembly: Iterable[str]) -> list[str]:
    """Return the innermost loop with the most tensor-core instructions, or FMAs if none has any.

    Innermost: a loop over tiles holds the loop over K and all that is around it. Of equals the
    first: where a step over R is as long as one over K, the loop over R comes second.
    """
    found, labels = instructions(assembly)
    spans = []
    for i, text in enumerate(found):
        branch = BRANCH.search(text)
        if branch and labels.get(branch[1], i + 1) <= i:
            spans.append((labels[branch[1]], i + 1))
    inner = [a for a in spans if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in spans)]
    loops = [found[first:last] for first, last in sorted(inner)]
    pattern = TENSOR_CORE if any(count(TENSOR_CORE, loop) for loop in loops) else FMA
    return max(loops, key=lambda loop: count(pattern, loop), default=[])


def count(pattern: re.Pattern, texts: Iterable[str]) -> int:
    """Count the instructions that match."""
    return sum(1 for text in texts if pattern.search(text))


def copies_ahead(loop: Iterable[str]) -> int | None:
    """Return the groups of copies into shared memory that a loop leaves on their way.

    That is the least number which a wait in the loop allows; 0 means that it waits for all of
    them. ``None`` without such copies: loads through registers, by descriptor, or none.
    """
    if not count(COPY, loop):
        return None
    return min((int(wait[1], 16) for text in loop if (wait := WAIT.search(text))), default=0)


def disassembled(kernel: triton.compiler.CompiledKernel) -> tuple[list[str], int]:
    """Return the assembly of the machine code and the registers of a thread."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        return text.splitlines(), int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], **run).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], **run).stdout
    return sass.splitlines(), int(re.search(r"REG:(\d+)", usage)[1])


def occupancy(limits: Limits, registers: int, shared: int, warps: int) -> float:
    """Share of the warps of a multiprocessor that fit, by registers and shared memory."""
    per_block = (registers + 7) // 8 * 8 * warps * limits.gpu.warp_size
    # A block's shared memory comes with 1 KiB of the system's own on NVIDIA GPUs.
    taken = shared + (1024 if limits.gpu.backend == "cuda" else 0)
    blocks = min(limits.registers // per_block, limits.warps // warps)
    blocks = min(blocks, limits.shared_per_sm // taken) if taken else blocks
    return blocks * warps / limits.warps


def report_row(kernel: str, dtype: str, r: int, target: str) -> Row:
    """Compile one launch and read its machine code."""
    limits = TARGETS[target]
    launch = make_launch(kernel, DTYPES[dtype], r, target)
    binary = compiled(launch, limits.gpu)
    assembly, registers = disassembled(binary)
    plain: list[str] | None = None
    if kernel in MARKED:
        bare = make_launch(kernel, DTYPES[dtype], r, target, plain=True)
        plain = main_loop(disassembled(compiled(bare, limits.gpu))[0])
    found, loop, t = instructions(assembly)[0], main_loop(assembly), launch.tile
    return Row(
        kernel=kernel,
        dtype=dtype,
        r=r,
        tile=f"{t.m}x{t.n}x{t.k} R{t.r} {t.warps}w {t.stages}s",
        target=target,
        registers=registers,
        spills=count(SPILL, found),
        shared_bytes=binary.metadata.shared,
        shared_limit_bytes=SHARED_LIMIT_BYTES[target],
        tensor_core_instructions=count(TENSOR_CORE, loop),
        tma_loads=count(TMA_LOAD, found),
        loop_instructions=len(loop),
        plain_tensor_core_instructions=None if plain is None else count(TENSOR_CORE, plain),
        plain_loop_instructions=None if plain is None else len(plain),
        occupancy=occupancy(limits, registers, binary.metadata.shared, t.warps),
        copies_ahead=copies_ahead(loop),
    )


# Where the loop over K has to stay that of the plain GEMM, and how much longer it may be.
MARK_TARGETS, MARK = ("sm_80", "sm_90"), 1.05


def runs_ahead(row: Row) -> bool:
    """Return whether the kernel of a row reads memory once and so lives by loads ahead of use.

    A group under dropout beyond R = 16, and of two on sm_120, has registers for one tile only;
    there the Philox rounds take longer than the loads.
    """
    name, *options = row.kernel.split("+")
    group = name == "shrink" and len(options) == 2
    drawn = group and (row.r > 16 or (options[0] == "2" and row.target == "sm_120"))
    once = name in ("shrink", "grad_out", "grad_a") and row.dtype != "fp32"
    return once and prefetches(row.target) and not drawn


def faults(row: Row) -> list[str]:
    """Say what is wrong with a row; nothing, for a library that may be released."""
    found = []
    if row.spills:
        found.append(f"{row.spills} spills")
    if row.shared_bytes > row.shared_limit_bytes:
        found.append(f"{row.shared_bytes} bytes of shared memory, of {row.shared_limit_bytes}")
    if row.loop_instructions == 0:
        found.append("no loop found")
    products = row.kernel != "sum_partials"
    on_cores = row.dtype != "fp32" or row.target == "gfx942"  # which has fp32 matrix cores
    if (row.tensor_core_instructions > 0) != (products and on_cores):
        found.append(f"{row.tensor_core_instructions} tensor-core instructions")
    if (row.tma_loads > 0) != row.kernel.endswith("+tma"):
        found.append(f"{row.tma_loads} loads by descriptor")
    if runs_ahead(row) and not row.copies_ahead:
        found.append("waits for all its copies before a product")
    if row.plain_loop_instructions is None:
        return found
    if row.tensor_core_instructions != row.plain_tensor_core_instructions:
        plain = row.plain_tensor_core_instructions
        found.append(f"{row.tensor_core_instructions} tensor-core instructions, plain {plain}")
    if row.target in MARK_TARGETS and row.loop_instructions > MARK * row.plain_loop_instructions:
        plain = row.plain_loop_instructions
        found.append(f"{row.loop_instructions} instructions in the K loop, plain {plain}")
    return found


def cases(kernel: str = "", dtype: str = "", target: str = "") -> Iterator[tuple]:
    """Yield (kernel, dtype, R, target) of every row; an empty word takes all."""
    for to in (target,) if target else TARGETS:
        for name in (kernel,) if kernel else KERNELS:
            for kind in (dtype,) if dtype else DTYPES:
                if name.endswith("+tma") and (to not in GEMM_PERSISTENT or kind == "fp32"):
                    continue
                # Of bf16 it differs by the type of the product: enough where the loop is compared.
                if kind == "fp16" and not dtype and name not in MARKED:
                    continue
                yield from ((name, kind, r, to) for r in RANKS)


def line(row: Row) -> str:
    """Return one line of the printed table."""
    plain = "" if row.plain_loop_instructions is None else f" (plain {row.plain_loop_instructions})"
    return (
        f"{row.target:7} {row.kernel:15} {row.dtype:5} R {row.r:<4} {row.tile:24} "
        f"regs {row.registers:3} spills {row.spills:3} "
        f"shared {row.shared_bytes:6}/{row.shared_limit_bytes} "
        f"mma {row.tensor_core_instructions:3} tma {row.tma_loads:2} "
        f"loop {row.loop_instructions:4}{plain} "
        f"occupancy {row.occupancy:.0%}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, default="")
    parser.add_argument("--dtype", choices=DTYPES, default="")
    parser.add_argument("--target", choices=TARGETS, default="")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes that compile")
    options = parser.parse_args(arguments)
    wanted = list(cases(options.kernel, options.dtype, options.target))
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(report_row, *zip(*wanted, strict=True)):
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        header = f'{{"triton": {json.dumps(triton.__version__)}, "rows": [\n'
        options.json.write_text(header + lines + "\n]}\n")
    bad = [row for row in rows if faults(row)]
    for row in bad:
        print(f"{row.target} {row.kernel} {row.dtype} R {row.r}: {'; '.join(faults(row))}")
    print(f"{len(rows)} rows compiled; {len(bad)} with a fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

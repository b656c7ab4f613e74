"""Compile every kernel ahead of time, without a GPU, and report what the compiler made of it.

    python -m benchmarks.compile_report                                 the whole table
    python -m benchmarks.compile_report --target sm_90 --kernel dx      a part of it
    python -m benchmarks.compile_report --json FILE                     {"rows": [...]}

A row is one launch as the library would make it at M = 8192, K = N = 4096 with fp32 adapters,
a gate and a bias. ``loop_instructions`` is the length of the main loop: of all the loops in the
machine code the one with the most tensor-core instructions (or FMAs, where fp32 uses none). For the
GEMM, ``plain_loop_instructions`` is that of the same kernel with the low-rank part compiled out.
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

from ila_kernels.kernels import grad_a, grad_out, lowrank_gemm, partials, shrink
from ila_kernels.kernels.launch import Launch

M, K, N = 8192, 4096, 4096
RANKS = (8, 16, 64, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = (
    "shrink",
    "shrink+dropout",
    "forward",
    "dx",
    "dx+dropout",
    "grad_out",
    "grad_a+dropout",
    "sum_partials",
)


@dataclass(frozen=True)
class Limits:
    """A target and what one of its multiprocessors has."""

    gpu: GPUTarget
    shared_per_block: int
    shared_per_sm: int
    registers: int
    warps: int


TARGETS = {
    "sm_80": Limits(GPUTarget("cuda", 80, 32), 163 * 1024, 164 * 1024, 65536, 64),
    "sm_90": Limits(GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024, 65536, 64),
    "sm_100": Limits(GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024, 65536, 64),
    "sm_120": Limits(GPUTarget("cuda", 120, 32), 99 * 1024, 100 * 1024, 65536, 48),
    # 4 SIMDs of 512 registers a lane and 8 waves each.
    "gfx942": Limits(GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, 4 * 512 * 64, 32),
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
    loop_instructions: int
    plain_tensor_core_instructions: int | None
    plain_loop_instructions: int | None
    occupancy: float


def make_launch(
    kernel: str, dtype: torch.dtype, r: int, target: str, plain: bool = False
) -> Launch:
    """Return the library's own launch of ``kernel``, on tensors without data."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.float32
    x, dy, w, thin = empty(M, K), empty(M, N), empty(N, K), empty(M, r)
    a, b, gate = empty(r, K, dtype=wide), empty(N, r, dtype=wide), empty(1, dtype=wide)
    name, _, dropout = kernel.partition("+")
    seed, p = (2**40, 0.1) if dropout else (None, 0.0)
    if name == "shrink":
        return shrink.launch(x, a, thin, seed, p, target)
    if name in ("forward", "dx"):
        update = (thin, b.t()) if name == "forward" else (thin, a)
        u, v = (None, None) if plain else update
        gate = None if plain else gate
        if name == "forward":
            bias = empty(N)
            return lowrank_gemm.launch(
                x, w.t(), u, v, empty(M, N), 2.0, gate, bias, None, 0, target
            )
        return lowrank_gemm.launch(dy, w, u, v, empty(M, K), 2.0, gate, None, seed, p, target)
    if name == "grad_out":
        return grad_out.launch(dy, b, thin, *grad_out.shares(dy, r, target), target)
    if name == "grad_a":
        return grad_a.launch(thin, x, empty(8, r, K, dtype=wide), 2**40, p, target)
    if name == "sum_partials":
        out, inner = empty(M, r), empty(M, dtype=wide)
        return partials.launch(empty(8, M, r, dtype=wide), out, None, thin, inner, 1.0)
    raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")


POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def compiled(launch: Launch, gpu: GPUTarget) -> triton.compiler.CompiledKernel:
    """Compile as the runtime would: its specialisation on 1 and on multiples of 16 included."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (special and type(value) is int and value == 1)
        ):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if (
            special
            and not isinstance(value, float)
            and (isinstance(value, Tensor) or value % 16 == 0)
        ):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {
        "num_warps": launch.tile.warps,
        "num_stages": launch.tile.stages,
        "enable_fp_fusion": True,
    }
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=options)


TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|QMMA|OMMA|v_s?mfma\w*|v_wmma\w*)\b")
FMA = re.compile(r"\b(FFMA2?|v_(?:pk_)?fma\w*)\b")
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
    if kernel in ("forward", "dx"):
        bare = make_launch(kernel, DTYPES[dtype], r, target, plain=True)
        plain = main_loop(disassembled(compiled(bare, limits.gpu))[0])
    loop, t = main_loop(assembly), launch.tile
    return Row(
        kernel=kernel,
        dtype=dtype,
        r=r,
        tile=f"{t.m}x{t.n}x{t.k} R{t.r} {t.warps}w {t.stages}s",
        target=target,
        registers=registers,
        spills=count(SPILL, instructions(assembly)[0]),
        shared_bytes=binary.metadata.shared,
        shared_limit_bytes=limits.shared_per_block,
        tensor_core_instructions=count(TENSOR_CORE, loop),
        loop_instructions=len(loop),
        plain_tensor_core_instructions=None if plain is None else count(TENSOR_CORE, plain),
        plain_loop_instructions=None if plain is None else len(plain),
        occupancy=occupancy(limits, registers, binary.metadata.shared, t.warps),
    )


def cases(kernel: str = "", dtype: str = "", target: str = "") -> Iterator[tuple]:
    """Yield (kernel, dtype, R, target) of every row; an empty word takes all."""
    for to in (target,) if target else TARGETS:
        for name in (kernel,) if kernel else KERNELS:
            for kind in (dtype,) if dtype else DTYPES:
                yield from ((name, kind, r, to) for r in RANKS)


def line(row: Row) -> str:
    """Return one line of the printed table."""
    plain = "" if row.plain_loop_instructions is None else f" (plain {row.plain_loop_instructions})"
    return (
        f"{row.target:7} {row.kernel:15} {row.dtype:5} R {row.r:<4} {row.tile:24} "
        f"regs {row.registers:3} spills {row.spills:3} "
        f"shared {row.shared_bytes:6}/{row.shared_limit_bytes} "
        f"mma {row.tensor_core_instructions:3} loop {row.loop_instructions:4}{plain} "
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
        options.json.write_text(
            json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    bad = [r for r in rows if r.spills or r.shared_bytes > r.shared_limit_bytes]
    print(f"{len(rows)} rows compiled; {len(bad)} spill or want too much shared memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

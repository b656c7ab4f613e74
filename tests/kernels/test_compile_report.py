"""What the compiler makes of the kernels, read from machine code; needs Triton and no GPU."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import compile_report
from ila_kernels.config import SHARED_LIMIT_BYTES
from ila_kernels.kernels import launch

RESULTS = Path(compile_report.__file__).parent / "results" / "compile-report.json"

# Where the mark holds, K loop ≤ 105 % of the plain GEMM's, at the rank that most people train.
MARKED = [
    (kernel, dtype, 16, target)
    for kernel, dtype, target in itertools.product(
        ("forward", "dx"), ("bf16", "fp16", "fp32"), compile_report.MARK_TARGETS
    )
]
# One row of each kind that has its own way to go wrong; `make report` compiles all of them.
ROWS = [
    *MARKED,
    ("forward", "bf16", 8, "sm_80"),  # R below the MMA's 16: masked loads of U and V
    ("forward", "bf16", 256, "sm_80"),
    ("dx", "fp16", 64, "sm_80"),
    ("dx+dropout", "bf16", 8, "sm_80"),  # spilled at N = 128
    ("dx", "bf16", 64, "sm_90"),  # 6 % over with steps of 32 over R
    ("forward", "fp32", 8, "sm_90"),  # spilled at 64 x 64; at R = 16, above, at 64 x 32
    ("forward+tma", "bf16", 8, "sm_90"),
    ("dx+tma", "fp16", 64, "sm_90"),  # spilled at 128 x 256
    ("dx+dropout+tma", "bf16", 64, "sm_90"),  # spilled at N = 128
    ("grad_out", "bf16", 16, "sm_90"),
    ("grad_out", "bf16", 8, "sm_80"),
    ("grad_a+3", "bf16", 64, "sm_80"),
    ("grad_a+3+dropout", "bf16", 16, "sm_90"),
    ("dx", "bf16", 16, "sm_100"),
    ("forward+tma", "bf16", 8, "sm_100"),  # spilled at 128 x 128 with 3 stages
    ("dx+tma", "bf16", 16, "sm_120"),
    ("shrink+dropout", "bf16", 64, "sm_120"),
    ("shrink+3+dropout", "bf16", 16, "sm_90"),  # spilled with steps of 64 over K
    ("shrink+3+dropout", "bf16", 64, "sm_80"),  # spilled with blocks of 64 over R
    ("shrink+2+dropout", "fp32", 16, "sm_90"),  # spilled with 32 rows
    ("grad_a+dropout", "fp16", 16, "gfx942"),
    ("dx", "bf16", 16, "gfx942"),
    ("dx", "fp32", 16, "gfx942"),
    ("sum_partials", "fp32", 16, "sm_90"),
]


def test_adding_to_the_dx_of_a_group_leaves_room_for_two_blocks():
    # 148 registers while all of C came beside all the accumulators: one block, half the warps.
    assert compile_report.report_row("dx+add", "bf16", 16, "sm_100").occupancy == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS, ids=[" ".join(map(str, case)) for case in ROWS])
def test_a_kernel_compiles_without_spills_and_keeps_its_k_loop(case):
    assert compile_report.faults(compile_report.report_row(*case)) == []


@pytest.mark.parametrize("target", ["sm_90", "gfx90a", "gfx942", "gfx950", "gfx1201"])
def test_fp32_compiles_where_pytorch_allows_tf32(target, monkeypatch):
    # Of AMD's compilers only the one for gfx942 takes "tf32"; the others raise.
    monkeypatch.setattr(launch, "_tf32_allowed", lambda: True)
    shrink = compile_report.make_launch("shrink", torch.float32, 16, target)
    assert shrink.arguments["PRECISION"] == ("tf32" if target in ("sm_90", "gfx942") else "ieee")
    gpu = compile_report.gpu_of(target)
    assert compile_report.compiled(shrink, gpu).metadata.target == gpu


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(
    ("kernel", "r"), [("shrink", 32), ("shrink+dropout", 16), ("shrink+2", 16), ("shrink+3", 8)]
)
def test_tiles_of_few_rows_spill_nothing_and_load_ahead(kernel, r, target, monkeypatch):
    monkeypatch.setattr(compile_report, "M", 2048)
    row = compile_report.report_row(kernel, "bf16", r, target)
    assert compile_report.faults(row) == []
    assert row.tile.startswith("32x" if (kernel, target) != ("shrink+3", "sm_120") else "64x")


@pytest.mark.parametrize("target", ["sm_87", "sm_103", "sm_121"])
def test_a_sister_of_a_target_takes_its_tiles_without_spills(target):
    forward = compile_report.make_launch("forward", torch.bfloat16, 16, target)
    binary = compile_report.compiled(forward, compile_report.gpu_of(target))
    assert binary.metadata.shared <= SHARED_LIMIT_BYTES[target]
    found, _ = compile_report.instructions(compile_report.disassembled(binary)[0])
    assert compile_report.count(compile_report.SPILL, found) == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["shrink", "shrink+3", "grad_out", "grad_a", "grad_a+3"])
def test_loads_are_on_their_way_while_a_tile_is_multiplied(kernel, target):
    launch = compile_report.make_launch(kernel, torch.bfloat16, 16, target)
    assembly, _ = compile_report.disassembled(
        compile_report.compiled(launch, compile_report.gpu_of(target))
    )
    loop = compile_report.main_loop(assembly)
    tile_loads = [text for text in loop if re.search(r"\bLDG\.", text)]
    assert tile_loads == []  # x and dy go to shared memory, not through registers
    # No wait of the loop, hence none before a product, is for the copies just begun.
    assert compile_report.count(compile_report.TENSOR_CORE, loop) > 0
    assert compile_report.copies_ahead(loop) >= 2


GOOD = compile_report.Row(
    kernel="forward+tma",
    dtype="bf16",
    r=16,
    tile="",
    target="sm_90",
    registers=160,
    spills=0,
    shared_bytes=1000,
    shared_limit_bytes=1000,
    tensor_core_instructions=4,
    tma_loads=8,
    loop_instructions=105,
    plain_tensor_core_instructions=4,
    plain_loop_instructions=100,
    occupancy=0.5,
    copies_ahead=4,
)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 2}, "2 spills"),
        ({"shared_bytes": 1001}, "1001 bytes of shared memory, of 1000"),
        ({"loop_instructions": 0}, "no loop found"),
        ({"loop_instructions": 106}, "106 instructions in the K loop, plain 100"),
        ({"tensor_core_instructions": 5}, "5 tensor-core instructions, plain 4"),
        (
            {"tensor_core_instructions": 0, "plain_tensor_core_instructions": 0},
            "0 tensor-core instructions",
        ),
        ({"tma_loads": 0}, "0 loads by descriptor"),
        ({"kernel": "forward"}, "8 loads by descriptor"),
        (
            {"kernel": "grad_out", "tma_loads": 0, "copies_ahead": 0},
            "waits for all its copies before a product",
        ),
    ],
)
def test_a_fault_is_named(change, fault):
    assert compile_report.faults(GOOD) == []
    assert compile_report.faults(dataclasses.replace(GOOD, **change)) == [fault]


def test_the_committed_report_is_whole_and_without_fault():
    rows = [compile_report.Row(**row) for row in json.loads(RESULTS.read_text("utf-8"))["rows"]]
    assert [(r.kernel, r.dtype, r.r, r.target) for r in rows] == list(compile_report.cases())
    assert [(row, compile_report.faults(row)) for row in rows if compile_report.faults(row)] == []


SASS = """
.L_x_0:
        /*0010*/                   LDGSTS.E [R1], desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/                   STL [R1+0x4], R2 ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1) ;
"""


def test_the_main_loop_is_read_from_sass():
    loop = compile_report.main_loop(SASS.splitlines())
    assert [text.split()[0] for text in loop] == ["LDGSTS.E", "HMMA.16816.F32.BF16", "@!P0"]
    found, _ = compile_report.instructions(SASS.splitlines())
    assert compile_report.count(compile_report.SPILL, found) == 1


def test_a_wait_for_all_copies_is_told_from_one_for_the_oldest():
    loop = SASS.splitlines()[2:5]
    assert compile_report.copies_ahead(loop) == 0
    ahead = [*loop, "DEPBAR.LE SB0, 0x4 ;", "DEPBAR.LE SB0, 0x2 ;"]
    assert compile_report.copies_ahead(ahead) == 2
    assert compile_report.copies_ahead([*ahead, "DEPBAR.LE SB0, 0x0 ;"]) == 0
    assert compile_report.copies_ahead(["LDG.E R1, desc[UR4][R2.64] ;"]) is None


NESTED = """
.L_tiles:
    IMAD R1, R1, R2, R3 ;
.L_k:
    HMMA.16816.F32 R4, R8, R12, R4 ;
    IADD3 R1, R1, R2, R3 ;
    @P0 BRA `(.L_k) ;
.L_r:
    HMMA.16816.F32 R4, R8, R12, R4 ;
    FFMA R1, R1, R2, R3 ;
    FFMA R1, R1, R2, R3 ;
    @P0 BRA `(.L_r) ;
    @P1 BRA `(.L_tiles) ;
"""


def test_the_main_loop_is_innermost_and_of_equals_the_first():
    # By FMAs the loop over R passed for the loop over K on gfx942, and its length for that one's.
    loop = compile_report.main_loop(NESTED.splitlines())
    assert [text.split()[0] for text in loop] == ["HMMA.16816.F32", "IADD3", "@P0"]


def test_the_report_covers_every_kernel_dtype_rank_and_target():
    cases = list(compile_report.cases())
    by_descriptor = (5 + 2) * 4 * 3  # bf16 and fp16 of persistent kernels, ranks, targets
    by_pointer = (21 * 2 + 4) * 4 * 5  # bf16 and fp32 of all, fp16 of the compared GEMMs
    assert len(cases) == len(set(cases)) == by_pointer + by_descriptor

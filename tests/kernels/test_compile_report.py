"""What the compiler makes of the kernels, read from machine code; needs Triton and no GPU."""

import pytest

pytest.importorskip("triton")

from benchmarks import compile_report

pytestmark = pytest.mark.slow

# One row of each kind that has its own way to go wrong; `make report` compiles all of them.
ROWS = [
    ("forward", "bf16", 8, "sm_80"),  # R below the MMA's 16: masked loads of U and V
    ("forward", "bf16", 256, "sm_80"),
    ("dx", "fp16", 64, "sm_80"),
    ("dx+dropout", "bf16", 8, "sm_80"),  # spilled at N = 128
    ("forward", "bf16", 16, "sm_90"),
    ("dx", "bf16", 64, "sm_90"),  # 6 % over with steps of 32 over R
    ("forward", "fp32", 8, "sm_90"),  # spilled at 64 x 64
    ("forward", "fp32", 16, "sm_90"),  # spilled at 64 x 32
    ("grad_out", "bf16", 16, "sm_90"),
    ("dx", "bf16", 16, "sm_100"),
    ("forward", "bf16", 16, "sm_120"),
    ("shrink+dropout", "bf16", 64, "sm_120"),
    ("grad_a+dropout", "fp16", 16, "gfx942"),
    ("dx", "bf16", 16, "gfx942"),
    ("sum_partials", "fp32", 16, "sm_90"),
]


@pytest.mark.parametrize("case", ROWS, ids=[" ".join(map(str, case)) for case in ROWS])
def test_a_kernel_compiles_without_spills_and_keeps_its_k_loop(case):
    row = compile_report.report_row(*case)
    assert row.spills == 0
    assert row.shared_bytes <= row.shared_limit_bytes
    assert row.loop_instructions > 0
    products = row.kernel != "sum_partials"
    assert (row.tensor_core_instructions > 0) == (products and row.dtype != "fp32")
    if row.plain_loop_instructions is not None:
        assert row.tensor_core_instructions == row.plain_tensor_core_instructions
        assert row.loop_instructions <= 1.05 * row.plain_loop_instructions


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
    assert len(cases) == len(set(cases)) == 8 * 3 * 4 * 5

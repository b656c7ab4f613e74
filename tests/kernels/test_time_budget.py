import dataclasses

import pytest

from ila_kernels.roofline import CEILINGS, Ceiling
from ila_kernels.time_budget import (
    LLAMA_3_8B,
    PATHS,
    Speeds,
    base_us,
    markdown_table,
    time_budget,
    totals,
)

H100 = CEILINGS["NVIDIA H100 80GB HBM3"]
GPUS = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090")


def sums(**change) -> dict[str, float]:
    return totals(time_budget(**({"gpu": H100, "tokens": 8192} | change)))


def test_the_base_is_the_flops_of_the_block():
    # q, o: 4096²; k, v: 4096 x 1024; gate, up, down: 4096 x 14336; twice, by 2 FLOPs a product.
    products = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    expected = 2 * 2 * 8192 * products / (989.4e6 * 0.71)
    assert base_us(H100, 8192) == pytest.approx(expected)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_each_step_from_addmm_to_the_fused_kernels_is_cheaper(gpu, tokens):
    found = sums(gpu=CEILINGS[gpu], tokens=tokens)
    assert found["triton"] < found["hybrid"] < found["eager"] < found["addmm"]


def test_a_slower_gemm_costs_the_fused_path_alone():
    base, slow = sums(), sums(rho=1.1)
    assert slow["triton"] - base["triton"] == pytest.approx(0.1 * base_us(H100, 8192))
    assert all(slow[path] == base[path] for path in PATHS[1:])


def test_twice_the_bandwidth_halves_all_but_the_gaps():
    twice = dataclasses.replace(H100, memory_gb_s=2 * H100.memory_gb_s)
    none = Speeds(gap_us=0.0)
    for path, us in sums(speeds=none).items():
        assert sums(gpu=twice, speeds=none)[path] == pytest.approx(us / 2)


def test_without_gaps_and_shares_the_bytes_of_the_updates_are_those_of_the_outputs():
    speeds = Speeds(memory=1.0, pointwise=1.0, exposed=0.0, gap_us=0.0)
    rows = {row.part: row.us for row in time_budget(Ceiling(1.0, 1.0), 1000, speeds=speeds)}
    outputs = sum(n for _, ns in LLAMA_3_8B for n in ns)
    inputs = sum(k for k, _ in LLAMA_3_8B)
    for part, width in (("update of y", outputs), ("update of dx", inputs)):
        assert rows[part]["addmm"] == pytest.approx(2 * 2 * 1000 * width / 1e3)
        assert rows[part]["eager"] == pytest.approx(2 * 1000 * width / 1e3)
        assert rows[part]["triton"] == 0.0
    assert rows["t = x Aᵀ"]["triton"] >= 2 * 1000 * inputs / 1e3


def test_the_table_has_a_row_for_each_part_and_says_what_would_show_it_wrong():
    rows, lines = time_budget(H100, 8192), markdown_table(H100, 8192).splitlines()
    assert len(lines) == 2 + len(rows) + 1
    assert {line.count("|") for line in lines} == {len(PATHS) + 3}
    for row, line in zip(rows, lines[2:], strict=False):
        assert row.part in line
        assert row.falsified_by
        assert row.falsified_by in line
    assert "%" in lines[-1]

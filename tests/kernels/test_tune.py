"""The searcher's own logic, with a made-up timer in place of a GPU."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from ila_kernels.config import GEMM_16BIT, GEMM_PERSISTENT, SHARED_LIMIT_BYTES, Tile

JOBS = tune.products([(8192, 4096, 1024)], r=16)


@pytest.mark.parametrize("target", [*SHARED_LIMIT_BYTES, "a GPU of tomorrow"])
@pytest.mark.parametrize("form", ["pointer", "persistent"])
def test_candidates_fit_their_target(target, form):
    tiles = tune.candidates(target, form, r=64)
    assert bool(tiles) == (form == "pointer" or target in GEMM_PERSISTENT)
    assert len(tiles) == len(set(tiles))
    limit = SHARED_LIMIT_BYTES.get(target, 48 * 1024)
    for tile in tiles:
        assert 2 * tile.stages * (tile.m + tile.n) * tile.k <= limit
        lanes = 64 if target == "gfx942" else 32
        assert tile.m * tile.n / (lanes * tile.warps) <= 128  # accumulators, of 255 registers
        assert tile.r == min(64, tile.k)


@pytest.mark.parametrize("table", [GEMM_16BIT, GEMM_PERSISTENT])
def test_what_the_tables_hold_is_among_the_candidates(table):
    form = "persistent" if table is GEMM_PERSISTENT else "pointer"
    for target, tile in table.items():
        assert replace(tile, r=16) in tune.candidates(target, form, r=16)


def test_less_shared_memory_leaves_fewer_candidates():
    found = [len(tune.candidates("sm_90", "pointer", 16, kib * 1024)) for kib in (48, 99, 227)]
    assert found == sorted(found)
    assert 0 < found[0] < found[-1]


def on_meta(job, tile):
    z = job.tensors(torch.bfloat16, "meta")
    arguments = (z["p"], z["q"], z["u"], z["v"], z["c"], 0.5, None, None, None, 0.0)
    return tune.lowrank_gemm.launch(*arguments, "sm_90", None, tile)


def test_the_fastest_tile_wins_and_one_that_cannot_run_is_left_out():
    tiles = tune.candidates("sm_90", "pointer", 16)
    best, never, flaky = tiles[5], tiles[9], tiles[11]
    calls = []

    def timer(launch):
        tile, n = launch.tile, launch.arguments["N"]
        calls.append(tile)
        if tile == never or (tile == flaky and n == 4096):  # flaky: runs on the first job only
            return math.inf
        return {best: 1.0, flaky: 1.1}.get(tile, 2.0 + tiles.index(tile) / 100)

    times = tune.search(JOBS, tiles, on_meta, timer, keep=4, rounds=3)
    assert len(times) == 4
    assert never not in times
    assert len(calls) == len(tiles) + 4 * len(JOBS) * 3
    ranked = tune.ranking(times)
    assert ranked[0] == (best, 1.0)
    assert flaky not in dict(ranked)
    assert [score for _, score in ranked] == sorted(score for _, score in ranked)


def test_rounds_are_interleaved_and_their_median_counts():
    a, b = tune.candidates("sm_90", "pointer", 16)[:2]
    order, noise = [], iter([1.0, 2.0, 9.0, 2.0, 1.0, 2.0, 1.0, 2.0])

    def timer(launch):
        order.append(launch.tile)
        return next(noise)

    times = tune.search(JOBS[:1], [a, b], on_meta, timer, keep=2, rounds=3)
    assert order == [a, b] * 4
    assert times == {a: [1.0], b: [2.0]}


def test_the_score_is_a_geometric_mean_over_the_products():
    a, b = tune.candidates("sm_90", "pointer", 16)[:2]
    (first, one), (second, other) = tune.ranking({a: [1.0, 10.0], b: [2.0, 5.5]})
    assert (first, second) == (a, b)
    assert one == pytest.approx(math.sqrt(10 / 5.5))
    assert other == pytest.approx(math.sqrt(2.0))
    assert tune.ranking({a: [math.inf, 1.0]}) == []


def test_the_launches_are_those_of_the_library():
    forward, dx = JOBS
    tile = GEMM_16BIT["sm_90"]
    y, x_grad = on_meta(forward, replace(tile, r=16)), on_meta(dx, replace(tile, r=16))
    assert (y.arguments["M"], y.arguments["N"], y.arguments["K"]) == (8192, 1024, 4096)
    assert (x_grad.arguments["M"], x_grad.arguments["N"], x_grad.arguments["K"]) == (
        8192,
        4096,
        1024,
    )
    # The strides of x Wᵀ and t Bᵀ, and of dy W and u A.
    assert (y.arguments["q_k"], y.arguments["v_r"]) == (1, 1)
    assert (x_grad.arguments["q_n"], x_grad.arguments["v_n"]) == (1, 1)


def test_a_row_can_be_pasted_into_its_table():
    tile = Tile(128, 256, 64, 16, warps=8, stages=4)
    text = tune.tile_row("sm_90", tile, "Measured: " + "word " * 40)
    assert all(len(line) <= 100 for line in text.splitlines())
    pasted = eval("{" + text + "}", {"Tile": Tile})
    assert pasted == {"sm_90": replace(tile, r=0)}


def test_shapes_are_read_or_refused(capsys):
    assert tune.shape("8192x4096x1024") == (8192, 4096, 1024)
    for wrong in ("8192", "8192x4096", "0x1x1", "axbxc"):
        with pytest.raises(SystemExit):
            tune.main(["--shapes", wrong])
        assert "a shape is MxKxN" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing was measured" in printed.err

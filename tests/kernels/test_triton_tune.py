"""The searcher on a GPU, or emulated with a clock that stands still: no wrong tile is timed."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from ila_kernels.config import Tile
from ila_kernels.kernels.launch import Launch

pytestmark = pytest.mark.gpu

JOBS = tune.products([(150, 72, 136)], r=16)
TILE = Tile(64, 64, 32, 16, warps=4, stages=2)


def test_a_tile_is_timed_once_its_numbers_are_right(monkeypatch):
    clock = itertools.count(1)
    monkeypatch.setattr(tune, "time_ms", lambda run: float(next(clock)))
    bench = tune.Bench(JOBS, "pointer", "sm_80", programs=2)
    times = tune.search(JOBS, [TILE], bench.launch, bench.time, rounds=1)
    assert times == {TILE: [2.0, 3.0]}


def test_a_tile_with_wrong_numbers_is_never_timed(monkeypatch, capsys):
    monkeypatch.setattr(tune, "time_ms", lambda run: 1.0)
    monkeypatch.setattr(Launch, "run", lambda self: self.arguments["c_ptr"].zero_())
    bench = tune.Bench(JOBS, "pointer", "sm_80", programs=2)
    assert bench.time(bench.launch(JOBS[0], TILE)) == math.inf
    assert "AssertionError" in capsys.readouterr().err
    assert torch.isfinite(bench.tensors[JOBS[0]]["c"]).all()

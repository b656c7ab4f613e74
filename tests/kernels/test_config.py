import itertools

import pytest

from ila_kernels import config
from ila_kernels.config import (
    GEMM_16BIT,
    gemm_tile,
    grad_tile,
    rank_block,
    resolve_impl,
    shrink_tile,
)

TARGETS = [*GEMM_16BIT, "sm_75", "sm_120", "gfx942", "unknown", ""]


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_every_request_has_a_tile_that_triton_takes(target):
    for r, width in itertools.product([1, 2, 15, 16, 17, 64, 70, 256, 1000], [2, 4]):
        tiles = [shrink_tile(r, width), grad_tile(r, width)]
        for m, n, dropout in itertools.product([0, 1, 64, 65, 10**6], [0, 1, 4096], [False, True]):
            tiles.append(gemm_tile(m, n, r, width, target, dropout))
        for tile in tiles:
            blocks = (tile.m, tile.n, tile.k, tile.r, tile.warps)
            assert all(map(is_power_of_two, blocks)), tile
            assert tile.r >= 16  # the least of a product
            assert tile.stages >= 1


def test_rank_block_covers_r_or_stops_at_the_most():
    for r in range(1, 300):
        block = rank_block(r, 64)
        assert 16 <= block <= 64
        assert block >= min(r, 64)
        assert block < 2 * max(r, 16)


def test_asking_for_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed; use impl='auto'"):
        resolve_impl("triton", "cuda")
    monkeypatch.setattr(config, "find_spec", lambda name: object())
    assert resolve_impl("triton", "cuda") == ("triton", "asked for")
    with pytest.raises(RuntimeError, match="the tensors are on mps; use impl='auto'"):
        resolve_impl("triton", "mps")


def test_auto_claims_nothing_that_was_not_measured():
    chosen, why = resolve_impl("auto", "cuda")
    assert chosen == "eager"
    assert "no measurement yet" in why

"""Each kernel alone: every row of the tile table, several adapters, and the dropout mask."""

import math

import pytest
import torch

pytest.importorskip("triton")

from ila_kernels.config import GEMM_16BIT, shrink_shares
from ila_kernels.kernels import grad_out, lowrank_gemm
from ila_kernels.kernels.grad_a import Adapter, grad_a
from ila_kernels.kernels.partials import Sum, add_shares
from ila_kernels.kernels.philox import threshold
from ila_kernels.kernels.shrink import shrink
from ila_kernels.testing import assert_within_rounding

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def normal(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to("cuda", dtype)


@pytest.mark.parametrize("layout", ["forward", "dx"])
@pytest.mark.parametrize("target", [*GEMM_16BIT, "unknown"])
def test_every_tile_of_the_gemm_is_right(target, layout):
    # Two tiles each way, the second one a rim; K has a tail; R takes two steps.
    m, k, n, r = 150, 72, 140, 40
    if torch.cuda.get_device_capability() < (9, 0) and target in ("sm_90", "sm_100"):
        pytest.skip("tile of a GPU with more shared memory")
    p, u, gate = normal(m, k), normal(m, r), torch.tensor([0.7], device="cuda")
    q = normal(n, k).t() if layout == "forward" else normal(k, n)
    v = normal(n, r, dtype=FP32).t() if layout == "forward" else normal(r, n, dtype=FP32)
    bias, c = normal(n), torch.empty(m, n, dtype=BF16, device="cuda")
    lowrank_gemm.launch(p, q, u, v, c, 0.5, gate, bias, None, 0.0, target).run()

    def formula(dtype):
        wide = [z.to(dtype) for z in (p, q, u, v, bias, gate)]
        return wide[0] @ wide[1] + wide[2] @ (wide[3] * (0.5 * wide[5])) + wide[4]

    assert_within_rounding(c, formula(torch.float64), formula(BF16), "C")


@pytest.mark.parametrize("target", ["sm_90", "unknown"])
@pytest.mark.parametrize("r", [1, 40])
def test_grad_out_leaves_shares_that_add_up(target, r):
    m, n = 1030, 260  # two stretches of rows, two blocks of columns
    dy, b, t = normal(m, n, dtype=FP16), normal(n, r, dtype=FP32), normal(m, r, dtype=FP16)
    u, db = grad_out.shares(dy, r, target)
    assert u.shape[0] > 1
    assert db.shape[0] > 1
    grad_out.launch(dy, b, t, u, db, target).run()
    wide = [z.double() for z in (dy, b, t)]
    assert_within_rounding(u.sum(0), wide[0] @ wide[1], dy @ b.to(FP16), "u")
    assert_within_rounding(db.sum(0), wide[0].t() @ wide[2], dy.t() @ t, "dB")


# --- dropout


def mask(seed: int, m: int, k: int, p: float) -> torch.Tensor:
    x, a = torch.ones(m, k, device="cuda"), torch.eye(k, device="cuda")
    return shrink(x, [a], [seed], p)[0] != 0


def philox(key: int, counter: list[int]) -> list[int]:
    """Philox-4x32-7 (Salmon et al., SC 2011) in plain integers."""
    low = 2**32 - 1
    keys, c = [key & low, key >> 32 & low], list(counter)
    for _ in range(7):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ keys[0], b & low, (a >> 32) ^ c[3] ^ keys[1], a & low]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return c


@pytest.mark.parametrize("seed", [0, 5, 2**61 + 12345])
def test_mask_is_philox_of_row_and_column(seed):
    m, k, p = 40, 70, 0.3
    drawn = mask(seed, m, k, p)
    for row, column in ((0, 0), (0, 3), (1, 0), (39, 69), (17, 66), (33, 31)):
        word = philox(seed, [row, column // 8, 0, 0])[column % 8 // 2]
        bits = word >> 16 if column % 2 else word & 0xFFFF
        assert bool(drawn[row, column]) == (bits >= threshold(p)), (row, column)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_mask_keeps_one_minus_p_everywhere(p):
    m, k = 200, 120
    drawn = mask(2**61 + 1, m, k, p).double()
    # 5 standard errors, of the whole and of the worst of 320 rows and columns.
    error = math.sqrt(p * (1 - p))
    assert abs(drawn.mean() - (1 - p)) <= 5 * error / math.sqrt(m * k)
    assert (drawn.mean(0) - (1 - p)).abs().max() <= 5 * error / math.sqrt(m)
    assert (drawn.mean(1) - (1 - p)).abs().max() <= 5 * error / math.sqrt(k)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("seeds", [None, (5, 6, 7, 8)])
def test_a_pass_over_x_serves_three_adapters_as_it_serves_one(seeds, dtype):
    # Ranks that share no block, a fourth in a pass of its own, and a stride that is no row's.
    x, p = normal(70, 100, dtype=dtype), 0.0 if seeds is None else 0.3
    adapters = [normal(8, 100), normal(100, 3, dtype=FP32).t(), normal(70, 100), normal(1, 100)]
    for i, t in enumerate(shrink(x, adapters, seeds, p)):
        keep = None if seeds is None else mask(seeds[i], 70, 100, p)
        exact, plain = (product(x.to(d), adapters[i].to(d), keep, p) for d in (FP64, dtype))
        assert t.is_contiguous()
        assert_within_rounding(t, exact, plain, f"t[{i}]")


def product(x, a, keep, p):
    return (x if keep is None else x * keep) @ a.t() / (1 - p)


def test_masks_of_neighbouring_seeds_are_independent():
    a, b = (mask(s, 200, 120, 0.5).double() for s in (6, 7))
    assert abs(((a - 0.5) * (b - 0.5)).mean()) <= 5 * 0.25 / math.sqrt(200 * 120)


@pytest.mark.parametrize("seeds", [None, (5, 6)])
def test_parts_of_k_add_up(seeds):
    # Few rows at a large rank: three parts of K, the last one short.
    m, k, p = 70, 2100, 0.0 if seeds is None else 0.3
    assert shrink_shares(m, k, 40) == 3
    x, adapters = normal(m, k), [normal(40, k, dtype=FP32) / 46, normal(33, k) / 46]
    for i, t in enumerate(shrink(x, adapters, seeds, p)):
        keep = None if seeds is None else mask(seeds[i], m, k, p)
        exact, plain = (product(x.to(d), adapters[i].to(d), keep, p) for d in (FP64, BF16))
        assert_within_rounding(t, exact, plain, f"t[{i}]")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_pass_over_x_makes_every_da_as_it_makes_one(dropout_p):
    # Ranks of one and of several blocks, several stretches of rows, a fourth in its own pass.
    x, seeds = normal(300, 270), (5, 6, 7, 8)
    us = [normal(300, r) for r in (8, 3, 40, 16)]
    gates = [None, torch.tensor([0.7], device="cuda"), None, None]
    rows = zip(us, seeds, gates, (FP32, BF16, FP32, FP32), strict=True)
    adapters = [Adapter(u, seed, 0.5, gate, dtype) for u, seed, gate, dtype in rows]
    for z, da in zip(adapters, grad_a(x, adapters, dropout_p), strict=True):
        keep = mask(z.seed, 300, 270, dropout_p) if dropout_p else 1.0
        factor = 0.5 * (1.0 if z.gate is None else z.gate)
        exact, plain = (
            (z.u.to(d).t() @ (x.to(d) * keep)) * (factor / (1 - dropout_p)) for d in (FP64, BF16)
        )
        assert da.dtype == z.dtype
        assert_within_rounding(da, exact, plain, "dA")


@pytest.mark.parametrize("count", [0, 1, 8, 11])
def test_one_launch_makes_several_sums(count):
    shares = [normal(count, *size, dtype=FP32) for size in ((37, 5), (600, 3), (1, 1))]
    gate, t = torch.tensor([0.7], device="cuda"), normal(37, 5, dtype=FP32)
    sums = [Sum(shares[0], FP32, t=t), Sum(shares[1], BF16, 2.0, gate), Sum(shares[2], FP32)]
    outs, inners = add_shares(sums)
    exact = [share.double().sum(0) for share in shares]
    exact[1] *= 2.0 * gate.double()
    for out, right in zip(outs, exact, strict=True):
        assert_within_rounding(out, right, right.to(out.dtype), "Σ")
    assert inners[1:] == [None, None]
    terms = exact[0] * t.double()
    assert abs(inners[0].double() - terms.sum()) <= 40 * 2**-24 * terms.abs().sum()

import math

import pytest
import torch
from torch.nn import functional as F

from ila_kernels import masked_lora_linear
from ila_kernels.dropout import draw_seed, keep_mask
from ila_kernels.testing import assert_within_rounding, make_inputs

CPU = torch.device("cpu")


def test_mask_is_a_function_of_its_seed():
    seed = torch.tensor([5])
    mask = keep_mask(seed, 37, 48, 0.3, CPU)
    torch.rand(1000)  # another user of the default generator
    assert torch.equal(mask, keep_mask(seed, 37, 48, 0.3, CPU))
    assert not torch.equal(mask, keep_mask(seed + 1, 37, 48, 0.3, CPU))


def test_drawing_a_mask_leaves_the_default_generator_alone():
    before = torch.get_rng_state()
    keep_mask(torch.tensor([5]), 37, 48, 0.3, CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.95])
def test_mask_keeps_one_minus_p_everywhere(p):
    m, k = 400, 250
    mask = keep_mask(torch.tensor([2**61]), m, k, p, CPU).double()
    # 5 standard errors, of the whole and of the worst of 650 rows and columns.
    error = math.sqrt(p * (1 - p))
    assert abs(mask.mean() - (1 - p)) <= 5 * error / math.sqrt(m * k)
    assert (mask.mean(0) - (1 - p)).abs().max() <= 5 * error / math.sqrt(m)
    assert (mask.mean(1) - (1 - p)).abs().max() <= 5 * error / math.sqrt(k)


def test_masks_of_neighbouring_seeds_are_independent():
    a, b = (keep_mask(torch.tensor([s]), 400, 250, 0.5, CPU).double() for s in (6, 7))
    assert abs(((a - 0.5) * (b - 0.5)).mean()) <= 5 * 0.25 / math.sqrt(400 * 250)


@pytest.mark.parametrize(("m", "k"), [(0, 5), (5, 0), (1, 1)])
def test_mask_of_any_size_can_be_drawn(m, k):
    mask = keep_mask(torch.tensor([5]), m, k, 0.3, CPU)
    assert mask.shape == (m, k)
    assert mask.dtype == torch.bool


def test_seeds_follow_manual_seed():
    torch.manual_seed(3)
    first = draw_seed(2)
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(2))
    assert first.device.type == "cpu"
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_two_calls_draw_different_masks(impl):
    i = make_inputs(37, 48, 40, 4, dtype=torch.float32)
    first, second = (
        masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, dropout_p=0.5, impl=impl)
        for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_no_seed_is_drawn_without_dropout():
    i = make_inputs(37, 48, 40, 4, dtype=torch.float32, gate=0.5)
    before = torch.get_rng_state()
    masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.gate)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("m", [37, 101])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_stands_where_peft_puts_it(m, dtype):
    # PEFT: base(x) + B(A(dropout(x))) · s; only the low-rank branch is dropped.
    p, s, seed = 0.3, 1.7, torch.tensor([9])
    i = make_inputs(m, 48, 40, 4, dtype=dtype, bias=True)

    def peft(j):
        x_hat = j.x * keep_mask(seed, m, 48, p, CPU) / (1 - p)
        low_rank = F.linear(F.linear(x_hat, j.lora_a), j.lora_b)
        return F.linear(j.x, j.weight, j.bias) + low_rank * s

    actual = masked_lora_linear(
        i.x, i.weight, i.lora_a, i.lora_b, bias=i.bias, scale=s, dropout_p=p, seed=seed
    )
    if dtype == torch.float64:
        torch.testing.assert_close(actual, peft(i), rtol=1e-13, atol=1e-13)
    else:
        assert_within_rounding(actual, peft(i.cast(torch.float64)), peft(i), "y")


def test_update_is_right_on_average():
    i = make_inputs(4, 48, 40, 4, dtype=torch.float64, requires=())
    bare = F.linear(i.x, i.weight)
    update = F.linear(F.linear(i.x, i.lora_a), i.lora_b)
    draws = torch.stack(
        [
            masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, dropout_p=0.5) - bare
            for _ in range(400)
        ]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - update).abs() <= 5 * standard_error).all()


def test_a_mask_is_not_frozen_into_a_captured_graph(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="dropout_p must be 0 while a CUDA graph is captured"):
        keep_mask._init_fn(torch.tensor([5]), 4, 8, 0.5, torch.device("cuda"))

"""The share of a small update that survives in a 16-bit y and dx.

    share = ⟨y − base, update⟩ / ⟨update, update⟩        base = x Wᵀ (+ bias), rounded

y and base are rounded by at most half a unit in the last place each, so the share of an update that
is added before the rounding is 1 up to the mean of that noise over all elements.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ila_kernels import eager, masked_lora_linear, masked_lora_linear_group
from ila_kernels.testing import Inputs, make_inputs

M, K, N, R = 384, 320, 352, 8
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def with_update_of(size: float, bias: bool = False) -> Inputs:
    """The update of ``make_inputs`` is 0.3 of y."""
    i = make_inputs(M, K, N, R, dtype=BF16, adapter_dtype=FP32, bias=bias, requires=("x",))
    with torch.no_grad():
        i.lora_b.mul_(size / 0.3)
    return i


def share(result: Tensor, base: Tensor, update: Tensor) -> tuple[float, float]:
    """The share, and five standard deviations of it if both results are rounded once."""
    result, base, size = result.double(), base.double(), update.square().sum()
    # A rounding is uniform in ± eps/2 of the value: eps/√12, twice.
    noise = torch.finfo(BF16).eps / 6**0.5 * (base * update).norm()
    return ((result - base) * update).sum().item() / size.item(), 5 * (noise / size).item()


def forward_share(i: Inputs, y: Tensor) -> tuple[float, float]:
    update = i.x.double() @ i.lora_a.double().t() @ i.lora_b.double().t()
    return share(y, F.linear(i.x, i.weight, i.bias), update)


def dx_share(i: Inputs, dx: Tensor) -> tuple[float, float]:
    update = i.dy.double() @ i.lora_b.double() @ i.lora_a.double()
    return share(dx, i.dy @ i.weight, update)


def peft(i: Inputs) -> Tensor:
    """PEFT's formula in the dtype of the base; fp32 adapters change what is added, not how."""
    a, b = i.lora_a.to(BF16), i.lora_b.to(BF16)
    return F.linear(i.x, i.weight, i.bias) + F.linear(F.linear(i.x, a), b)


def base_first(i: Inputs) -> Tensor:
    a, b = i.lora_a.to(BF16), i.lora_b.to(BF16)
    return F.linear(i.x, i.weight, i.bias).addmm_(i.x @ a.t(), b.t())


@pytest.mark.parametrize("size", [3e-3, 1e-3, 3e-4])
@pytest.mark.parametrize("gate", [None, 0.7])
def test_all_of_a_small_update_survives(size, gate):
    i = with_update_of(size)
    # γα B is B again, by a factor that has to be applied.
    gate, scale = (None, 0.7) if gate is None else (torch.tensor([gate]), 1.0)
    y = masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b / 0.7, gate, scale=scale)
    (dx,) = torch.autograd.grad(y, i.x, i.dy)
    for kept, noise in (forward_share(i, y), dx_share(i, dx)):
        assert abs(kept - 1) < noise


@pytest.mark.parametrize("size", [1e-3, 3e-4])
@pytest.mark.parametrize("other", [peft, base_first])
def test_an_update_added_afterwards_is_lost_in_part(size, other):
    i = with_update_of(size)
    kept, noise = forward_share(i, other(i))
    assert kept < 1 - noise


@pytest.mark.parametrize("size", [1e-3, 3e-4])
def test_all_of_it_survives_in_a_group(size):
    i = with_update_of(size)
    two = [i.lora_a, i.lora_a], [i.lora_b, i.lora_b]
    ys = masked_lora_linear_group(i.x, [i.weight, i.weight], *two)
    for y in ys:
        kept, noise = forward_share(i, y)
        assert abs(kept - 1) < noise
    # Only one output is used: two base products in bf16 round dx twice.
    (dx,) = torch.autograd.grad(ys[0], i.x, i.dy)
    kept, noise = dx_share(i, dx)
    assert abs(kept - 1) < noise


def test_a_bias_costs_no_more_of_the_update_than_adding_it_last():
    """The update is rounded against the bias, here a tenth of y, and not against y."""
    i = with_update_of(1e-3, bias=True)
    with torch.no_grad():
        i.bias.mul_(0.1)
    ours, noise = forward_share(
        i, masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b, bias=i.bias)
    )
    last, _ = forward_share(i, base_first(i))
    assert last < 1 - noise < ours


@pytest.mark.parametrize(("m", "columns", "dtype", "adds"), [
    (512, 1023, BF16, True), (512, 1024, BF16, False), (512, 1024, FP32, True),
    (512, 1024, torch.float16, True), (64, 8, BF16, False), (65, 8, BF16, True),
])  # fmt: skip
def test_the_base_comes_first_on_a_cpu_where_adding_to_the_update_costs_time(
    m, columns, dtype, adds
):
    x = torch.empty(m, 4, dtype=dtype)
    assert eager.base_adds(x, torch.empty(columns, 4, dtype=dtype), columns) is adds


def test_the_base_comes_first_on_a_cpu_where_its_sums_are_long():
    for terms, adds in ((1024, True), (1025, False)):
        x = torch.empty(128, terms, dtype=BF16)
        assert eager.base_adds(x, torch.empty(8, terms, dtype=BF16), 8) is adds


def test_on_another_device_the_update_comes_first_at_every_size():
    x = torch.empty(4096, 4, dtype=BF16, device="meta")
    assert eager.base_adds(x, torch.empty(4096, 4, dtype=BF16, device="meta"), 4096)


@pytest.mark.parametrize("outputs", [1, 2])
def test_both_orders_are_the_op_up_to_rounding(outputs, monkeypatch):
    """A group and a layer with a large result beside the same with the update first."""
    i = make_inputs(M, K, N, R, dtype=BF16, adapter_dtype=FP32, requires=("x", "lora_a", "lora_b"))
    leaves = (i.x, i.lora_a, i.lora_b)

    def run() -> list[Tensor]:
        each = ([t] * outputs for t in (i.weight, i.lora_a, i.lora_b))
        ys = masked_lora_linear_group(i.x, *each)
        return [*ys, *torch.autograd.grad(ys, leaves, [i.dy] * outputs)]

    first = run()
    monkeypatch.setattr(eager, "LARGE_RESULT", M)
    assert not torch.equal(run()[0], first[0])  # y rounds twice
    for found, wanted in zip(run(), first, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())

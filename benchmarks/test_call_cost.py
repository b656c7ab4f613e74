"""Cost of one call at few tokens: our layer against PEFT's, forward and backward, interleaved.

At M ≤ 64 neither bandwidth nor FLOPs matter on a CPU: this is the overhead of the layer itself. The
two layers hold the same tensors: copies of W in different places of memory differ by up to 4 %
at 576 x 576. One thread: with two, waking the other one in the products that both layers run is
three quarters of a bf16 call, and its noise hides the rest. CPU time, because another process that
takes the core for a moment is no cost of a call. Outputs and gradients are compared before anything
is timed.
"""

import copy
import statistics
import time

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

import ila
from ila_kernels.testing import assert_within_rounding

# (M, K, N): one token and few, a toy layer, and SmolLM2-135M's square and MLP layers.
SHAPES = [(1, 64, 64), (16, 64, 64), (1, 576, 576), (64, 576, 576), (64, 576, 1536)]
# Layers are made anew for each third of the rounds: where their objects lie moves a ratio by 2 %.
LAYERS, ROUNDS, CALLS = 3, 30, 10


def _layers(m: int, k: int, n: int, dtype: torch.dtype):
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    peft = Linear(base, "default", LoraConfig(r=8, init_lora_weights=False), r=8, lora_alpha=16)
    peft.lora_A.float()
    peft.lora_B.float()
    ours = copy.deepcopy(peft)
    for part in ("base_layer", "lora_A", "lora_B"):
        setattr(ours, part, getattr(peft, part))
    ila.convert(ours)
    x = torch.randn(m, k, dtype=dtype, requires_grad=True)
    return {"peft": peft, "ours": ours}, x, torch.randn(m, n, dtype=dtype)


def _step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    parameters = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for parameter in parameters:
        parameter.grad = None
    y = layer(x)
    y.backward(dy)
    return [y.detach(), *(parameter.grad for parameter in parameters)]


def _check(layers: dict[str, nn.Module], x: torch.Tensor, dy: torch.Tensor) -> None:
    exact = copy.deepcopy(layers["peft"]).double()
    x64 = x.detach().double().requires_grad_()
    names = ("y", "dx", "dA", "dB")
    results = {name: _step(layer, x, dy) for name, layer in layers.items()}
    expected = _step(exact, x64, dy.double())
    for name, ours, peft, exact_value in zip(names, *results.values(), expected, strict=True):
        assert_within_rounding(ours, exact_value, peft, name=name)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_call_is_no_slower_than_pefts(shape, dtype, benchmark):
    times: dict[str, list[float]] = {"peft": [], "ours": []}
    for _ in range(LAYERS):
        layers, x, dy = _layers(*shape, dtype)
        _check({"ours": layers["ours"], "peft": layers["peft"]}, x, dy)
        for _ in range(ROUNDS):
            for name, layer in layers.items():
                begin = time.process_time()
                for _ in range(CALLS):
                    _step(layer, x, dy)
                times[name].append((time.process_time() - begin) / CALLS * 1e6)
    ratios = sorted(o / p for o, p in zip(times["ours"], times["peft"], strict=True))
    ratio = statistics.median(ratios)
    benchmark.extra_info |= {
        "ratio_ours_to_peft": ratio,
        "ratio_p10_p90": [ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]],
        "median_us": {name: statistics.median(values) for name, values in times.items()},
    }
    benchmark.pedantic(_step, args=(layers["ours"], x, dy), rounds=20, iterations=CALLS)
    print(f"\nours / PEFT {ratio:.3f}  {benchmark.extra_info['median_us']}")
    assert ratio <= 1.0

import subprocess
import sys

import numpy as np
import pytest
import torch

from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.config import IMPLS, KERNEL_IMPLS, resolve_impl

M, K, N, R = 3, 8, 6, 2


def arguments(**changes):
    good = {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "lora_a": torch.randn(R, K),
        "lora_b": torch.randn(N, R),
        "gate": torch.ones(1),
        "bias": torch.randn(N),
        "scale": 1.0,
        "dropout_p": 0.0,
        "seed": None,
    }
    return good | changes


def group_arguments(**changes):
    good = {
        "x": torch.randn(M, K),
        "weights": [torch.randn(N, K), torch.randn(5, K)],
        "lora_as": [torch.randn(R, K), None],
        "lora_bs": [torch.randn(N, R), None],
        "gates": [torch.ones(1), None],
        "biases": [None, torch.randn(5)],
        "scales": [1.0, 2.0],
        "dropout_p": 0.0,
        "seed": None,
    }
    return good | changes


INTEGERS = torch.ones(M, K, dtype=torch.int64)
META = torch.device("meta")
BAD = [  # error, what it says, what was wrong
    (TypeError, r"x must be a tensor, got NoneType", {"x": None}),
    (TypeError, r"x must be a tensor, got list", {"x": [[1.0]]}),
    (TypeError, r"x must have a floating dtype, got torch.int64", {"x": INTEGERS}),
    (ValueError, r"x must have shape \(\.\.\., K\), got a scalar", {"x": torch.tensor(1.0)}),
    (TypeError, r"weight must be a tensor, got NoneType", {"weight": None}),
    (
        TypeError,  # a packed 4-bit weight
        r"weight must have a floating dtype, got torch.uint8",
        {"weight": torch.zeros(24, 1, dtype=torch.uint8)},
    ),
    (
        ValueError,
        r"weight must have shape \(N, 8\) to fit x \(3, 8\), got \(8, 6\)",
        {"weight": torch.randn(K, N)},
    ),
    (ValueError, r"weight must have shape \(N, 8\).* got \(8,\)", {"weight": torch.randn(K)}),
    (
        TypeError,
        r"weight must have the dtype of x, torch.float32, got torch.bfloat16",
        {"weight": torch.randn(N, K).bfloat16()},
    ),
    (
        ValueError,
        r"weight must be on cpu like x, got meta",
        {"weight": torch.ones(N, K, device=META)},
    ),
    (TypeError, r"lora_a must be a tensor, got NoneType", {"lora_a": None}),
    (ValueError, r"lora_a must have shape \(R, 8\), got \(8, 2\)", {"lora_a": torch.randn(K, R)}),
    (ValueError, r"lora_a must have shape \(R, 8\), got \(8,\)", {"lora_a": torch.randn(K)}),
    (ValueError, r"lora_a must have rank R ≥ 1, got shape \(0, 8\)", {"lora_a": torch.randn(0, K)}),
    (TypeError, r"lora_a must have a floating dtype, got torch.int64", {"lora_a": INTEGERS}),
    (
        ValueError,
        r"lora_a must be on cpu like x, got meta",
        {"lora_a": torch.ones(R, K, device=META)},
    ),
    (TypeError, r"lora_b must be a tensor, got NoneType", {"lora_b": None}),
    (ValueError, r"lora_b must have shape \(6, 2\), got \(2, 6\)", {"lora_b": torch.randn(R, N)}),
    (ValueError, r"lora_b must have shape \(6, 2\), got \(6, 3\)", {"lora_b": torch.randn(N, 3)}),
    (TypeError, r"gate must be a tensor, got float", {"gate": 0.5}),
    (ValueError, r"gate must have shape \(\) or \(1,\), got \(2,\)", {"gate": torch.ones(2)}),
    (ValueError, r"gate must have shape \(\) or \(1,\), got \(1, 1\)", {"gate": torch.ones(1, 1)}),
    (TypeError, r"gate must have a floating dtype, got torch.bool", {"gate": torch.tensor(True)}),
    (ValueError, r"gate must be on cpu like x, got meta", {"gate": torch.ones(1, device=META)}),
    (ValueError, r"bias must have shape \(6,\), got \(8,\)", {"bias": torch.randn(K)}),
    (
        TypeError,
        r"bias must have the dtype of x, torch.float32, got torch.float64",
        {"bias": torch.randn(N).double()},
    ),
    (TypeError, r"scale must be a number, got Tensor", {"scale": torch.tensor(2.0)}),
    (ValueError, r"scale must be finite, got nan", {"scale": float("nan")}),
    (ValueError, r"scale must be finite, got inf", {"scale": float("inf")}),
    (TypeError, r"dropout_p must be a number, got NoneType", {"dropout_p": None}),
    (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
    (ValueError, r"dropout_p must be in \[0, 1\), got -0.1", {"dropout_p": -0.1}),
    (ValueError, r"dropout_p must be in \[0, 1\), got nan", {"dropout_p": float("nan")}),
    (TypeError, r"seed must be an int64 tensor, got <class 'int'>", {"seed": 5}),
    (TypeError, r"seed must be an int64 tensor, got torch.float32", {"seed": torch.ones(1)}),
    (
        ValueError,
        r"seed must have shape \(1,\) on cpu, got \(2,\) on cpu",
        {"seed": torch.tensor([1, 2])},
    ),
    (
        ValueError,
        r"impl must be one of 'auto', 'triton', 'hybrid', 'eager', 'reference', got 'cuda'",
        {"impl": "cuda"},
    ),
]
A, B, W, G = torch.randn(R, K), torch.randn(N, R), torch.randn(N, K), torch.ones(1)
BAD_GROUP = [
    (TypeError, r"x must be a tensor, got NoneType", {"x": None}),
    (ValueError, r"weights must hold at least one member, got none", {"weights": []}),
    (TypeError, r"weights must be a list with an entry for .*, got NoneType", {"weights": None}),
    (TypeError, r"weights must be a list with an entry for .*, got Tensor", {"weights": W}),
    (TypeError, r"lora_as must be a list with an entry for .*, got NoneType", {"lora_as": None}),
    (TypeError, r"lora_bs must be a list with an entry for .*, got Tensor", {"lora_bs": B}),
    (TypeError, r"biases must be a list with an entry for .*, got Tensor", {"biases": B[0]}),
    (TypeError, r"scales must be a list with an entry for .*, got NoneType", {"scales": None}),
    (ValueError, r"lora_as must have 2 entries like weights, got 1", {"lora_as": [A]}),
    (ValueError, r"lora_bs must have 2 entries like weights, got 3", {"lora_bs": [B, None, None]}),
    (ValueError, r"gates must have 2 entries like weights, got 1", {"gates": [G]}),
    (ValueError, r"biases must have 2 entries like weights, got 3", {"biases": [None] * 3}),
    (ValueError, r"scales must have 2 entries like weights, got 1", {"scales": [1.0]}),
    (
        ValueError,
        r"lora_as\[0\] and lora_bs\[0\] must both be tensors or both None",
        {"lora_as": [None, None]},
    ),
    (ValueError, r"gates\[1\] must be None: member 1 has no adapter", {"gates": [None, G]}),
    (
        ValueError,
        r"weight of member 1 must have shape \(N, 8\) to fit x \(3, 8\), got \(5, 9\)",
        {"weights": [W, torch.randn(5, K + 1)]},
    ),
    (
        ValueError,
        r"lora_a of member 0 must have shape \(R, 8\), got \(2, 9\)",
        {"lora_as": [torch.randn(R, 9), None]},
    ),
    (
        ValueError,
        r"lora_b of member 0 must have shape \(6, 2\), got \(6, 1\)",
        {"lora_bs": [torch.randn(N, 1), None]},
    ),
    (
        ValueError,
        r"bias of member 1 must have shape \(5,\), got \(6,\)",
        {"biases": [None, torch.randn(N)]},
    ),
    (TypeError, r"scale of member 0 must be a number, got NoneType", {"scales": [None, 1.0]}),
    (ValueError, r"seed must have shape \(2,\) on cpu, got \(1,\)", {"seed": torch.tensor([1])}),
    (ValueError, r"impl must be one of .*, got None", {"impl": None}),
]


@pytest.mark.parametrize(
    ("error", "message", "changes", "autocast"),
    [(*row, False) for row in BAD]
    # Under autocast everything but the dtypes it makes equal is checked just the same.
    + [(*row, True) for row in BAD if "dtype of x" not in row[1]],
)
def test_errors_name_the_argument_the_expectation_and_what_came(error, message, changes, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(error) as caught:
        masked_lora_linear(**arguments(**changes))
    assert caught.match(message)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("error", "message", "changes"), BAD_GROUP)
def test_errors_of_a_group_name_the_member(error, message, changes, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(error) as caught:
        masked_lora_linear_group(**group_arguments(**changes))
    assert caught.match(message)


def test_good_arguments_pass():
    assert masked_lora_linear(**arguments()).shape == (M, N)
    assert [y.shape[1] for y in masked_lora_linear_group(**group_arguments())] == [N, 5]


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, int])
def test_numbers_may_be_those_of_numpy(number):
    given, listed, scale = arguments(), group_arguments(), number(2)
    expected = masked_lora_linear(**given | {"scale": 2.0})
    assert torch.equal(masked_lora_linear(**given | {"scale": scale}), expected)
    expected = masked_lora_linear_group(**listed | {"scales": 2.0})
    for scales in (scale, [scale, scale]):
        ys = masked_lora_linear_group(**listed | {"scales": scales})
        assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))
    masked_lora_linear(**given | {"dropout_p": np.float32(0.5)})


@pytest.mark.parametrize(
    ("function", "good"),
    [(masked_lora_linear, arguments), (masked_lora_linear_group, group_arguments)],
)
@pytest.mark.parametrize("impl", KERNEL_IMPLS)
def test_an_impl_that_was_asked_for_runs_or_raises(function, good, impl):
    with pytest.raises(RuntimeError, match=f"impl='{impl}' was asked for, but .* use impl='auto'"):
        function(**good(impl=impl))


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps", "one nobody has heard of"])
def test_auto_chooses_and_says_why(device_type):
    chosen, why = resolve_impl("auto", device_type)
    assert chosen in IMPLS
    assert chosen != "auto"
    assert device_type in why


FRESH = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
import ila_kernels
x, w = torch.randn(3, 8), torch.randn(6, 8)
a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
ila_kernels.masked_lora_linear(x, w, a, b, torch.ones(1), dropout_p=0.1).sum().backward()
assert a.grad is not None
assert not torch.cuda.is_initialized()
assert not {"transformers", "peft"} & sys.modules.keys()
"""


def test_works_without_triton_and_touches_no_gpu():
    result = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize("length", [2, 600])  # a short call and a long one take different paths
def test_numbers_of_numpy_are_scales(kind, length):
    x, w = torch.randn(length, 8), torch.randn(6, 8)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    expected = masked_lora_linear(x, w, a, b, scale=2.0)
    assert torch.equal(masked_lora_linear(x, w, a, b, scale=kind(2)), expected)
    expected = masked_lora_linear_group(x, [w], [a], [b], scales=2.0)
    for scales in (kind(2), [kind(2)], np.array([2.0], dtype=kind)):
        found = masked_lora_linear_group(x, [w], [a], [b], scales=scales)
        assert torch.equal(found[0], expected[0])

"""Bytes that the kernels load and store, counted by the emulator, against the cost model.

A launch's traffic with a tensor is the tensor's bytes that it loads, each once, and those that it
stores: what reaches memory if re-reads by neighbouring programs hit the cache. Real re-reads are
the tiles' business, as in any GEMM.
"""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.config import grad_tile
from ila_kernels.kernels import selfcheck
from ila_kernels.kernels.launch import Launch
from ila_kernels.roofline import (
    Problem,
    backward_cost,
    forward_cost,
    group_backward_cost,
    group_forward_cost,
)
from ila_kernels.testing import make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("ttsem" not in sys.modules, reason="only the emulator counts bytes"),
]

M, K, N, R = 1100, 72, 300, 5  # two stretches of rows, several tiles each way, none full
BF16, FP32 = torch.bfloat16, torch.float32


class Traffic:
    """Distinct bytes per launch: ``(kernel, argument, "load" or "store") -> bytes``."""

    def __init__(self):
        self.launches: list[dict] = []

    def total(self) -> int:
        return sum(sum(launch.values()) for launch in self.launches)

    def of(self, kernel: str, argument: str, kind: str) -> int:
        """Bytes over all launches of a kernel."""
        return sum(launch.get((kernel, argument, kind), 0) for launch in self.launches)


def tensors(arguments: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a launch by the name of its argument, which may be a tuple of several."""
    for name, value in arguments.items():
        several = value if isinstance(value, tuple) else (value,)
        yield from ((name, one) for one in several if isinstance(one, torch.Tensor))


@pytest.fixture
def traffic(monkeypatch):
    """Record every launch from here on; the gate and the last sum of dγ's shares are left out."""
    from ttsem.memory import Memory

    found = Traffic()
    touched: dict[str, list[np.ndarray]] = defaultdict(list)
    load, store, run = Memory.load, Memory.store, Launch.run

    def spy(kind, addresses, mask, itemsize):
        live = np.broadcast_to(True if mask is None else mask, np.shape(addresses)).reshape(-1)
        flat = np.asarray(addresses, dtype=np.int64).reshape(-1)[live.astype(bool)]
        touched[kind].append((flat[:, None] + np.arange(itemsize)).reshape(-1))

    def spy_load(self, addrs, mask, other, dtype):
        spy("load", addrs, mask, np.dtype(dtype).itemsize)
        return load(self, addrs, mask, other, dtype)

    def spy_store(self, addrs, values, mask):
        spy("store", addrs, mask, np.asarray(values).dtype.itemsize)
        return store(self, addrs, values, mask)

    def counted(launch):
        touched.clear()
        run(launch)
        kernel, bytes_of = launch.kernel.fn.__name__.strip("_"), {}
        for kind, pieces in touched.items():
            seen = np.unique(np.concatenate(pieces))
            inside = np.zeros(len(seen), dtype=bool)
            for name, tensor in tensors(launch.arguments):
                first = tensor.untyped_storage().data_ptr()
                own = (seen >= first) & (seen < first + tensor.untyped_storage().nbytes())
                inside |= own
                if own.any() and name not in ("gate_ptr", "gate_ptrs", "inner_ptrs"):
                    key = kernel, name.removesuffix("s").removesuffix("_ptr"), kind
                    bytes_of[key] = bytes_of.get(key, 0) + int(own.sum())
            assert inside.all(), f"{kernel} touches memory of none of its arguments"
        found.launches.append(bytes_of)

    monkeypatch.setattr(Memory, "load", spy_load)
    monkeypatch.setattr(Memory, "store", spy_store)
    monkeypatch.setattr(Launch, "run", counted)
    return found


def problem(dropout_p: float = 0.0) -> Problem:
    from ila_kernels.device import target_of

    x = torch.empty(0, device="cuda")
    block_n = grad_tile(R, 2, target_of(x)).n
    return Problem(M, K, N, R, 2, 4, dropout=dropout_p > 0, block_n=block_n)


def ours(i, dropout_p, impl="triton"):
    return masked_lora_linear(
        i.x, i.weight, i.lora_a, i.lora_b, i.gate, dropout_p=dropout_p, impl=impl
    )


def by_library(p: Problem, backward: bool = False) -> int:
    """Bytes that hybrid leaves to the library: the bare product, and its update, read again."""
    thin, columns = p.base_bytes * p.m * p.r, p.k if backward else p.n
    bare = backward_cost("frozen", p, {"x"}) if backward else forward_cost("frozen", p)
    return bare.bytes + thin + p.adapter_bytes * p.r * columns + 2 * p.base_bytes * p.m * columns


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_kernels_of_hybrid_move_their_part_of_the_cost_model(traffic, dropout_p):
    needs, p = {"x", "lora_a", "lora_b"}, problem(dropout_p)
    i = draw(needs)
    y = ours(i, dropout_p, "hybrid")
    counted = [launch for launch in traffic.launches if launch][-1]
    assert {key[0] for key in counted} == {"shrink"}
    assert sum(counted.values()) == forward_cost("hybrid", p).bytes - by_library(p)
    traffic.launches.clear()
    y.backward(i.dy)
    assert traffic.of("grad_out", "dy", "load") == 2 * M * N
    # Under dropout the update of dx is masked, so a kernel writes it.
    update = 2 * M * K + 2 * M * R + 4 * R * K if dropout_p else 0
    kernels = backward_cost("hybrid", p, needs).bytes - by_library(p, backward=True)
    assert traffic.total() == kernels + update


def draw(requires):
    return make_inputs(
        M, K, N, R, dtype=BF16, adapter_dtype=FP32, gate=0.5, requires=requires, device="cuda"
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_forward_moves_what_the_cost_model_says(traffic, dropout_p):
    i = draw(())
    traffic.launches.clear()  # the self-check's
    ours(i, dropout_p)
    counted = [launch for launch in traffic.launches if launch][-2:]
    assert [sorted({key[0] for key in launch}) for launch in counted] == [
        ["shrink"],
        ["lowrank_gemm"],
    ]
    traffic.launches = counted
    assert traffic.of("shrink", "x", "load") == 2 * M * K  # x once for t, ...
    assert traffic.total() == forward_cost("fused", problem(dropout_p)).bytes


BACKWARD = {
    "LoRA training with dropout": ({"x", "lora_a", "lora_b"}, 0.3),
    "LoRA training with dropout and a gate": ({"x", "lora_a", "lora_b", "gate"}, 0.3),
    "B and the gate, no dx": ({"lora_b", "gate"}, 0.0),
    "dx only: A and B frozen": ({"x"}, 0.0),
}


@pytest.mark.parametrize(("needs", "dropout_p"), BACKWARD.values(), ids=BACKWARD)
def test_backward_moves_what_the_cost_model_says(traffic, needs, dropout_p):
    i = draw(needs)
    y = ours(i, dropout_p)
    traffic.launches.clear()
    y.backward(i.dy)
    if "lora_b" in needs:
        # One read of dy gives u, dB and dγ; the second one is that of the input gradient.
        assert traffic.of("grad_out", "dy", "load") == 2 * M * N
    assert traffic.total() == backward_cost("fused", problem(dropout_p), needs).bytes


# --- q, k and v, or gate and up, and more members than one pass takes


class Group:
    """Members of one x, N and R of each; the outputs that have a dy are all of them."""

    def __init__(self, sizes, requires):
        kinds = {"dtype": BF16, "adapter_dtype": FP32, "gate": 0.5, "device": "cuda"}
        rows = [make_inputs(M, K, n, r, requires=requires, **kinds) for n, r in sizes]
        self.x, self.dys = rows[0].x, [row.dy for row in rows]
        names = ("weight", "lora_a", "lora_b", "gate")
        self.columns = [[getattr(row, name) for row in rows] for name in names]
        self.leaves = [t for column in self.columns for t in column if t.requires_grad]

    def __call__(self, dropout_p):
        return masked_lora_linear_group(self.x, *self.columns, dropout_p=dropout_p, impl="triton")


QKV = ((300, 5), (72, 5), (72, 3))


@pytest.mark.parametrize(
    ("sizes", "passes", "dropout_p"),
    [(QKV, 1, 0.0), (QKV[:2], 1, 0.3), (QKV + QKV[:1], 2, 0.3)],
)
def test_forward_of_a_group_moves_what_the_cost_model_says(traffic, sizes, passes, dropout_p):
    group = Group(sizes, ())
    selfcheck.ensure(group.x.device)
    traffic.launches.clear()
    group(dropout_p)
    assert traffic.of("shrink", "x", "load") == passes * 2 * M * K  # x once for every t
    members = [dataclasses.replace(problem(dropout_p), n=n, r=r) for n, r in sizes]
    assert traffic.total() == group_forward_cost("fused", members).bytes


def test_backward_of_a_group_moves_what_the_cost_model_says(traffic):
    needs = {"x", "lora_a", "lora_b", "gate"}
    group = Group(QKV, needs)
    ys = group(0.3)
    traffic.launches.clear()
    torch.autograd.grad(ys, [group.x, *group.leaves], group.dys)
    # dx is written by every member and read by all but the first.
    assert traffic.of("lowrank_gemm", "c", "store") == 3 * 2 * M * K
    assert traffic.of("lowrank_gemm", "c", "load") == 2 * 2 * M * K
    members = [dataclasses.replace(problem(0.3), n=n, r=r) for n, r in QKV]
    assert traffic.total() == group_backward_cost("fused", members, needs).bytes

"""What the host does for a block of a Llama: launches, variants that are compiled, time."""

import sys
import time
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from ila_kernels.eager import Needs
from ila_kernels.group import Member
from ila_kernels.kernels import group, launch
from tests.kernels import nowhere

pytestmark = pytest.mark.skipif("ttsem" in sys.modules, reason="the emulator replaces the launcher")

BF16, FP32 = torch.bfloat16, torch.float32
HIDDEN, KV, MLP, R = 256, 128, 512, 8
LAYERS = {
    "q k v": (HIDDEN, (HIDDEN, KV, KV)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate up": (HIDDEN, (MLP, MLP)),
    "down": (MLP, (HIDDEN,)),
}
TRAINING = Needs(x=True, weight=False, lora_a=True, lora_b=True, gate=False, bias=False)


class Block:
    """The linears of one block, all open, adapters in fp32 over a base in bf16."""

    def __init__(self, dropout_p: float = 0.0, r: int = R):
        self.dropout_p, self.groups = dropout_p, []
        for k, ns in LAYERS.values():
            members = []
            for n in ns:
                a, b = torch.zeros(r, k, dtype=FP32), torch.zeros(n, r, dtype=FP32)
                seed = torch.tensor([2**40]) if dropout_p else None
                w = torch.zeros(n, k, dtype=BF16)
                members.append(Member(w, a, b, None, None, seed, 2.0, None, TRAINING))
            self.groups.append(members)

    def forward(self, m: int) -> None:
        self.saved = []
        for members in self.groups:
            x = torch.empty(m, members[0].lora_a.shape[1], dtype=BF16)
            ys, ts = group.forward(x, members, self.dropout_p)
            rows = zip(members, ts, strict=True)
            self.saved.append((ys, x, [z._replace(t=t) for z, t in rows]))

    def backward(self) -> None:
        for dys, x, members in self.saved:
            group.backward(dys, x, members, self.dropout_p)


@pytest.fixture
def gpu(monkeypatch):
    with nowhere.gpu(monkeypatch) as driver:
        yield driver


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("m", [256, 8192])
def test_a_block_takes_few_launches(gpu, m, dropout_p):
    block = Block(dropout_p)
    calls = nowhere.LibraryCalls()
    with calls:
        block.forward(m)
    assert calls.names == []
    names = [name for name, _, _ in gpu.launches]
    assert sorted(names) == ["joined_gemm"] * 2 + ["lowrank_gemm"] * 2 + ["shrink"] * 4
    assert len(names) <= 9
    gpu.launches.clear()
    with calls:
        block.backward()
    counts = {name: [n for n, _, _ in gpu.launches].count(name) for name in nowhere.KERNELS}
    assert counts["grad_out"] == counts["lowrank_gemm"] == 7
    assert counts["sum_partials"] == 7 + 4  # u and dB of a layer, every dA of a group
    assert counts["grad_a"] == 4
    assert len(gpu.launches) + len(calls.names) <= 30
    assert calls.names == []


def test_a_prepared_launch_passes_what_a_new_one_would(gpu):
    # Two blocks with tensors at other addresses: the second one runs prepared launches only.
    for dropout_p in (0.0, 0.1):
        first, second = Block(dropout_p), Block(dropout_p)
        first.forward(256)
        first.backward()
        gpu.launches.clear()
        second.forward(256)
        second.backward()
        prepared = list(gpu.launches)
        gpu.launches.clear()
        launch._prepared.clear()
        # The same tensors once more, none of it prepared. New ones have new addresses, so only
        # what is not made anew is compared by address.
        second.forward(256)
        second.backward()
        assert len(prepared) == len(gpu.launches)
        for (name, grid, values), (name2, grid2, values2) in zip(
            prepared, gpu.launches, strict=True
        ):
            assert (name, grid) == (name2, grid2)
            assert list(map(described, values)) == list(map(described, values2))


def described(value):
    """A value of a launch; of a tensor what it looks like."""
    if isinstance(value, tuple):
        return tuple(map(described, value))
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return value


def test_the_tensors_of_a_prepared_launch_are_those_of_the_call(gpu):
    block = Block()
    block.forward(256)
    gpu.launches.clear()
    block.forward(256)
    joined = next(values for name, _, values in gpu.launches if name == "joined_gemm")
    ys, x, members = block.saved[0]
    assert joined[0] is x
    assert all(a is b.weight for a, b in zip(joined[1], members, strict=True))
    assert all(a is b for a, b in zip(joined[6], ys, strict=True))


def test_what_is_prepared_holds_no_tensor(gpu):
    block = Block(0.1)
    block.forward(256)
    block.backward()

    def tensors(value):
        several = value if isinstance(value, (tuple, list)) else ()
        return isinstance(value, torch.Tensor) or any(map(tensors, several))

    assert launch._prepared
    assert not any(tensors(z.values) for z in launch._prepared.values())


def test_another_layout_is_prepared_anew(gpu):
    # One element further on, the address is no multiple of 16 any more: other code.
    k, r = 256, 8
    a, buffer = torch.zeros(r, k), torch.zeros(64 * k + 1, dtype=BF16)
    for offset in (0, 1, 0, 1):
        group.shrink(buffer[offset : offset + 64 * k].view(64, k), [a])
    assert [len(gpu.launches), len(gpu.compiled), len(launch._prepared)] == [4, 2, 2]
    group.shrink(torch.zeros(64, 2 * k, dtype=BF16)[:, ::2], [a])
    group.shrink(torch.zeros(64, k, dtype=torch.float16), [a])
    assert [len(gpu.compiled), len(launch._prepared)] == [4, 4]


def test_few_launches_are_kept(gpu, monkeypatch):
    monkeypatch.setattr(launch, "MOST_PREPARED", 10)
    block = Block()
    for m in range(100, 110):
        block.forward(m)
        assert len(launch._prepared) <= 10


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_any_number_of_rows_compiles_a_kernel_twice_at_most(gpu, dropout_p):
    block = Block(dropout_p)
    lengths = [*range(1, 9000, 46), 1, 16, 64, 65, 4096, 4097]
    assert len(lengths) > 200
    for m in lengths:
        block.forward(m)
        block.backward()
    # Counted for each form of a kernel: its number of adapters, whether it adds to its output.
    variants = Counter(gpu.compiled)
    assert {form[0] for form in variants} == set(nowhere.KERNELS)
    assert max(variants.values()) <= 2, variants


def test_a_prepared_launch_takes_less_than_half_of_a_new_one(gpu, monkeypatch):
    seen = []
    with monkeypatch.context() as patch:
        for module in map(sys.modules.get, {k.fn.__module__ for k in nowhere.KERNELS.values()}):
            patch.setattr(module, "run_prepared", lambda *call: seen.append(call))
        block = Block()
        block.forward(256)
        block.backward()

    def prepared():
        for call in seen:
            launch.run_prepared(*call)

    def afresh():
        for _, _, make in seen:
            make().run()

    def seconds(step) -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    assert len(seen) == 8 + 29
    prepared()
    # In turn, so that both see the same machine; it may be busy.
    rounds = [(seconds(prepared), seconds(afresh)) for _ in range(31)]
    ours, before = (sorted(column)[len(rounds) // 2] for column in zip(*rounds, strict=True))
    assert ours < before / 2, (ours, before)

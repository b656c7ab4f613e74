"""The op contracts with impl="triton": opcheck, compilers, autograd's habits, no waiting."""

import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from ila_kernels.group_ops import absent
from ila_kernels.testing import Inputs, assert_within_rounding, make_inputs, values_and_grads
from tests.kernels import calls

pytestmark = pytest.mark.gpu

OPS = torch.ops.ila
EMULATED = "ttsem" in sys.modules
ALL_FOUR = {
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
}
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LORA = ("x", "lora_a", "lora_b")
ALL = (*LORA, "weight", "gate", "bias")


def inputs_of(m=20, dtype=FP32, gate=0.5, bias=True, requires=ALL, **options) -> Inputs:
    shape = (m, 24, 20, 3)
    kinds = {"dtype": dtype, "gate": gate, "bias": bias, "requires": requires, **options}
    return make_inputs(*shape, **kinds, device="cuda")


linear, group = (partial(f, impl="triton") for f in (calls.linear, calls.group))
BOTH = pytest.mark.parametrize("function", [linear, group], ids=["linear", "group"])


# --- contracts


def assert_passes_all_four(op, arguments):
    assert opcheck(op, arguments) == dict.fromkeys(ALL_FOUR, "SUCCESS")


@pytest.mark.parametrize(
    ("m", "gate", "dropout_p", "requires"),
    [
        (5, 0.5, 0.3, ALL),
        (5, None, 0.0, LORA),  # LoRA training
        (5, 0.5, 0.0, ("x", "gate")),  # the mask search
        (0, 0.5, 0.3, ("x", "lora_a")),  # no tokens
    ],
)
def test_linear_op_keeps_its_contract(plain_tensors, m, gate, dropout_p, requires):
    i = inputs_of(m, gate=gate, requires=requires)
    seed = torch.tensor([5]) if dropout_p else None
    tensors = (i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, seed)
    assert_passes_all_four(OPS.masked_lora_linear.default, (*tensors, 1.7, dropout_p, "triton"))


@pytest.mark.parametrize(
    ("dropout_p", "open_members", "requires"),
    [
        (0.3, (True, False, True), ALL),
        (0.0, (False, True, True), LORA),
        (0.0, (True, True, False), ("gate",)),
        (0.0, (False, False, False), ("x", "weight")),
    ],
)
def test_group_op_keeps_its_contract(plain_tensors, dropout_p, open_members, requires):
    rows = [inputs_of(5, bias=False, requires=requires, seed=s) for s in range(3)]
    x, none = rows[0].x, absent(rows[0].x.detach())
    lists = [[row.weight for row in rows]]
    for name in ("lora_a", "lora_b", "gate"):
        pairs = zip(rows, open_members, strict=True)
        lists.append([getattr(row, name) if is_open else none for row, is_open in pairs])
    seeds = torch.tensor([5, 6, 7]) if dropout_p else None
    arguments = (x, *lists, [none] * 3, seeds, [1.7, 1.0, 0.5], dropout_p, "triton")
    assert_passes_all_four(OPS.masked_lora_linear_group.default, arguments)


def test_backward_ops_have_the_fakes_of_their_results(plain_tensors):
    i = inputs_of(requires=())
    t, seed, needs = i.x.new_ones(20, 3), torch.tensor([5]), [True] * 6
    tensors = (i.dy, i.x, i.weight, i.lora_a, i.lora_b, i.gate, t, seed)
    op = OPS.masked_lora_linear_backward.default
    assert_passes_all_four(op, (*tensors, 1.7, 0.3, needs, "triton"))
    columns = ([i.dy, None, i.dy], i.x, [i.weight] * 3, [i.lora_a, i.lora_a, None])
    columns += ([i.lora_b, i.lora_b, None], [i.gate, None, None], [seed, seed, None])
    closed = [True, True, False, False, False, True]
    options = ([t, t, None], [1.7, 1.0, 0.5], 0.3, needs * 2 + closed, "triton")
    assert_passes_all_four(OPS.masked_lora_linear_group_backward.default, (*columns, *options))


# --- torch.compile


@BOTH
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_full_graph_with_dynamic_shapes(plain_tensors, function, dropout_p):
    def by_tensors(x, weight, lora_a, lora_b, gate, bias):
        return function(Inputs(x, weight, lora_a, lora_b, gate, bias, x), dropout_p)

    def compiled(i):
        return graph(i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias)

    graph = torch.compile(by_tensors, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 37):
        i, results = inputs_of(m), []
        for run in (lambda i: function(i, dropout_p), compiled):
            torch.manual_seed(7)  # what the seeds of dropout are drawn from
            results.append(values_and_grads(run, i))
        expected, actual = results
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (m, name)


def test_the_self_check_of_a_device_passes_inside_an_op(plain_tensors, monkeypatch):
    # There autograd records nothing, whatever enable_grad says.
    from ila_kernels.kernels import selfcheck

    monkeypatch.setattr(selfcheck, "_passed", set())
    i = inputs_of(5)
    tensors = (i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, None)
    OPS.masked_lora_linear(*tensors, 1.7, 0.0, "triton")[0].sum().backward()
    assert i.x.grad is not None
    assert selfcheck._passed


# --- autograd and autocast


@BOTH
def test_autocast_casts_as_linear_does(function):
    i = inputs_of()
    with torch.autocast("cuda", BF16):
        y = function(i)
    assert y.dtype == BF16
    wanted = i.wanted()
    grads = torch.autograd.grad(y, list(wanted.values()), i.dy.to(BF16))
    exact = values_and_grads(partial(function, impl="reference"), i.cast(FP64))
    plain = values_and_grads(partial(function, impl="reference"), i.cast(BF16))
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype == FP32
        assert_within_rounding(grad, exact[f"d{name}"], plain[f"d{name}"], name)


@BOTH
def test_autocast_around_backward_changes_no_dtype(function):
    i = inputs_of()
    y, wanted = function(i), i.wanted()
    with torch.autocast("cuda", BF16):
        grads = torch.autograd.grad(y, list(wanted.values()), i.dy)
    exact = values_and_grads(partial(function, impl="reference"), i.cast(FP64))
    plain = values_and_grads(partial(function, impl="reference"), i.cast(BF16))
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert_within_rounding(grad, exact[f"d{name}"], plain[f"d{name}"], name)


@BOTH
def test_an_x_used_twice_gets_both_gradients(function):
    i = inputs_of(dtype=BF16, requires=LORA)
    (once,) = torch.autograd.grad(function(i).sum(), i.x)  # dy is one element, expanded
    y = function(i)
    (twice,) = torch.autograd.grad(y.sum() + function(i).sum(), i.x)
    assert torch.equal(twice, 2 * once)


@BOTH
def test_backward_twice_gives_the_same_and_writes_to_nothing_saved(function):
    i, saved = inputs_of(dtype=BF16, adapter_dtype=FP32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = function(i, 0.3)
    kept = [*saved, i.dy, *i.wanted().values()]
    before = [t.detach().clone() for t in kept]
    wanted = list(i.wanted().values())
    first = torch.autograd.grad(y, wanted, i.dy, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(y, wanted, i.dy)
    for a, b, c in zip(first, second, copies, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert len(saved) > 4
    for t, copy in zip(kept, before, strict=True):
        assert torch.equal(t, copy)


@BOTH
def test_a_cuda_graph_replays_forward_and_backward(function):
    if EMULATED:
        pytest.skip("there is no stream to capture")
    i = inputs_of(m=70, dtype=BF16, adapter_dtype=FP32)
    wanted = list(i.wanted().values())

    def step() -> tuple[Tensor, ...]:
        y = function(i, 0.0)
        return (y.detach(), *torch.autograd.grad(y, wanted, i.dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, checks the device, fills the allocator
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        i.x.copy_(i.x.flip(0))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert_within_rounding(got, expected.double(), expected)


# --- the host waits for nothing

# What ends in a copy to the host, where the tensor is on a device; emulated it is on the host
# already, and these methods copy nothing that a dispatch mode could see.
TO_HOST = ("cpu", "numpy", "tolist", "item", "nonzero")
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
}


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device; seeds, drawn on the host, may be read."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.seeds, self.watching = set(), True
        from ila_kernels.kernels.launch import Launch

        for name in TO_HOST:
            patch.setattr(torch.Tensor, name, self.refusing(name, getattr(torch.Tensor, name)))
        patch.setattr(torch.Tensor, "to", self.refusing("to", torch.Tensor.to))
        patch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("synchronize"))
        if EMULATED:  # the emulator reads what a kernel is given
            patch.setattr(Launch, "run", self.unwatched(Launch.run))

    def refusing(self, name, method):
        def refuse(tensor, *args, **kwargs):
            to_host = name != "to" or "cpu" in map(str, (*args, *kwargs.values()))
            if self.watching and to_host and self.is_on_device(tensor):
                raise AssertionError(f"the host waits in {name}")
            return method(tensor, *args, **kwargs)

        return refuse

    def unwatched(self, run):
        def unwatched_run(launch):
            self.watching = False
            try:
                run(launch)
            finally:
                self.watching = True

        return unwatched_run

    def is_on_device(self, tensor: Tensor) -> bool:
        if EMULATED:
            return tensor.untyped_storage().data_ptr() not in self.seeds
        return tensor.is_cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if self.watching and counts(name, args) and self.is_on_device(args[0]):
            raise AssertionError(f"the host waits in {name}")
        out = func(*args, **(kwargs or {}))
        if name == "aten::randint":
            self.seeds.add(out.untyped_storage().data_ptr())
        source = {"aten::_to_copy": args[:1], "aten::copy_": args[1:2]}.get(name)
        if not EMULATED and source and source[0].is_cuda and not out.is_cuda:
            raise AssertionError(f"the host waits in {name}")
        return out


def counts(name: str, args: tuple) -> bool:
    """Whether an op counts something on the device to know the shape of its result, or reads it."""
    by_mask = name == "aten::index" and any(
        t is not None and t.dtype == torch.bool for t in args[1]
    )
    return name in WAITS or by_mask


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.item(),
        int,
        float,
        bool,
        lambda t: 1.0 if t else 0.0,
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.to(device=torch.device("cpu")),
        lambda t: t.tolist(),
        lambda t: t.nonzero(),
        torch.nonzero,
        lambda t: t[t > 0],
    ],
    ids=["item", "int", "float", "bool", "if", "cpu", "to", "to device", "tolist", "nonzero",
         "torch.nonzero", "t[mask]"],
)  # fmt: skip
def test_waiting_is_noticed(wait, monkeypatch):
    gate = torch.tensor([0.5], device="cuda")
    with NoWaiting(monkeypatch), pytest.raises(AssertionError, match="the host waits"):
        wait(gate)


@BOTH
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("requires", [ALL, ("gate",), LORA])
def test_the_host_waits_for_nothing(function, dropout_p, requires, monkeypatch):
    from ila_kernels.kernels import selfcheck

    i = inputs_of(dtype=BF16, adapter_dtype=FP32, requires=requires)
    selfcheck.ensure(i.x.device)  # waits, once in the life of a process
    with NoWaiting(monkeypatch):
        torch.autograd.grad(function(i, dropout_p), list(i.wanted().values()), i.dy)

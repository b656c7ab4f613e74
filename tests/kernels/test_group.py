import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.testing import assert_within_rounding, make_inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# (N, R, open?, gate, bias, scale): grouped-query attention, ranks of their own, one closed member
MEMBERS = [
    (40, 4, True, 0.6, True, 2.0),
    (24, 7, True, None, False, 0.5),
    (24, 4, False, None, True, 1.0),
    (8, 1, True, 0.0, False, 1.7),
]
SEEDS = torch.tensor([11, 12, 13, 14])


class Group:
    """x (M, K) and the lists of a call, leaves that require grad unless named otherwise."""

    def __init__(self, m, k, members=MEMBERS, *, dtype, adapter_dtype=None, frozen=()):
        parts = [
            make_inputs(
                m, k, n, r, dtype=dtype, adapter_dtype=adapter_dtype, gate=gate, bias=bias, seed=i
            )
            for i, (n, r, _, gate, bias, _) in enumerate(members)
        ]
        self.x = parts[0].x
        self.weights = [p.weight for p in parts]
        is_open = [row[2] for row in members]
        self.lora_as = [p.lora_a if o else None for p, o in zip(parts, is_open, strict=True)]
        self.lora_bs = [p.lora_b if o else None for p, o in zip(parts, is_open, strict=True)]
        self.gates = [p.gate for p in parts]
        self.biases = [p.bias for p in parts]
        self.scales = [row[5] for row in members]
        # Each dy leans towards its own update, so that dγ does not cancel; see make_inputs.
        self.dys = [p.dy for p in parts]
        for i, p in enumerate(parts[1:], 1):
            if self.lora_as[i] is not None:
                update = self.x.double() @ p.lora_a.double().t() @ p.lora_b.double().t()
                self.dys[i] = (torch.randn(m, p.dy.shape[1]) + update / 0.3).detach().to(dtype)
        for name in frozen:
            for t in self.columns()[name]:
                if t is not None:
                    t.requires_grad_(False)

    def columns(self) -> dict[str, list[Tensor | None]]:
        return {
            "x": [self.x],
            "weights": self.weights,
            "lora_as": self.lora_as,
            "lora_bs": self.lora_bs,
            "gates": self.gates,
            "biases": self.biases,
        }

    def wanted(self) -> dict[str, Tensor]:
        return {
            f"{name}[{i}]": t
            for name, column in self.columns().items()
            for i, t in enumerate(column)
            if t is not None and t.requires_grad
        }

    def cast(self, dtype) -> "Group":
        new = object.__new__(Group)
        for name, column in self.columns().items():
            copies = [
                None
                if t is None
                else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
                for t in column
            ]
            setattr(new, name, copies[0] if name == "x" else copies)
        new.scales, new.dys = self.scales, [dy.to(dtype) for dy in self.dys]
        return new

    def lists(self):
        return self.x, self.weights, self.lora_as, self.lora_bs, self.gates

    def together(self, **options) -> tuple[Tensor, ...]:
        return masked_lora_linear_group(
            *self.lists(), biases=self.biases, scales=self.scales, **options
        )

    def apart(self, dropout_p=0.0, seed=None, **options) -> tuple[Tensor, ...]:
        ys = []
        for i, (w, a, b, g, bias, scale) in enumerate(
            zip(*self.lists()[1:], self.biases, self.scales, strict=True)
        ):
            if a is None:
                ys.append(F.linear(self.x, w, bias))
                continue
            s = None if seed is None else seed[i : i + 1]
            ys.append(
                masked_lora_linear(
                    self.x, w, a, b, g, bias=bias, scale=scale, dropout_p=dropout_p, seed=s,
                    **options,
                )
            )  # fmt: skip
        return tuple(ys)


def results(group: Group, ys) -> dict[str, Tensor]:
    wanted = group.wanted()
    grads = torch.autograd.grad(ys, list(wanted.values()), group.dys)
    named = {f"y[{i}]": y.detach() for i, y in enumerate(ys)}
    return named | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}


def options_for(dropout_p):
    return {"dropout_p": dropout_p, "seed": SEEDS if dropout_p else None}


# --- derivatives

COLUMNS = ("x", "weights", "lora_as", "lora_bs", "gates", "biases")
SMALL = [
    (3, 2, True, 0.6, True, 2.0),
    (2, 1, False, None, True, 1.0),
    (2, 1, True, None, False, 1.5),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1,), (2,), (1, 2)])
def test_gradients_are_right_whichever_outputs_are_used(used, dropout_p):
    options = {"dropout_p": dropout_p, "seed": SEEDS[:3] if dropout_p else None}
    kept = [c for count in (1, 2, 6) for c in itertools.combinations(COLUMNS, count)]
    for names in kept if used == (0, 1, 2) else [COLUMNS, ("x",), ("gates",), ("lora_bs",)]:
        frozen = set(COLUMNS) - set(names)
        group = Group(3, 4, SMALL, dtype=FP64, frozen=frozen)
        wanted = list(group.wanted().values())

        def function(*tensors, group=group):
            # gradcheck perturbs the leaves in place; what is unused gets no dy at all.
            ys = group.together(**options)
            return tuple(ys[i] for i in used if ys[i].requires_grad)

        if function():
            assert torch.autograd.gradcheck(function, tuple(wanted)), (names, used)


def test_members_may_want_different_gradients():
    group = Group(5, 6, dtype=FP64)
    for tensor in (group.weights[0], group.lora_as[1], group.gates[0], group.biases[2]):
        tensor.requires_grad_(False)
    group.together()[1].sum().backward()
    got = {name for name, t in group.wanted().items() if t.grad is not None}
    assert {n for n in got if not n.endswith("[1]")} == {"x[0]"}
    assert "lora_bs[1]" in got
    assert group.lora_as[1].grad is None


# --- the law: together equals apart


@pytest.mark.parametrize("m", [0, 1, 37, 101])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_group_equals_separate_calls_in_fp64(m, dropout_p, impl):
    group = Group(m, 48, dtype=FP64)
    options = options_for(dropout_p)
    actual = results(group, group.together(impl=impl, **options))
    expected = results(group, group.apart(impl="reference", **options))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("m", [1, 37, 101])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32)]
)
def test_group_is_within_rounding_of_separate_calls(m, dropout_p, dtype, adapter_dtype):
    group = Group(m, 48, dtype=dtype, adapter_dtype=adapter_dtype)
    options = options_for(dropout_p)
    actual = results(group, group.together(**options))
    wide, narrow = group.cast(FP64), group.cast(dtype)
    expected = results(wide, wide.apart(impl="reference", **options))
    eager = results(narrow, narrow.apart(impl="reference", **options))
    wanted = group.wanted()
    for name, value in actual.items():
        assert value.dtype == (dtype if name[0] == "y" else wanted[name[1:]].dtype), name
        assert_within_rounding(value, expected[name], eager[name], name)


@pytest.mark.parametrize("m", [37, 101])
def test_closed_member_equals_bare_linear_bit_for_bit(m):
    group = Group(m, 48, dtype=BF16, adapter_dtype=FP32)
    y = group.together()[2]
    bare = F.linear(group.x, group.weights[2], group.biases[2])
    assert torch.equal(y, bare)
    leaves = [group.x, group.weights[2], group.biases[2]]
    expected = torch.autograd.grad(bare, leaves, group.dys[2])
    for a, b in zip(torch.autograd.grad(y, leaves, group.dys[2]), expected, strict=True):
        assert torch.equal(a, b)


def test_all_members_closed_is_bare_linears():
    members = [(5, 1, False, None, True, 1.0), (3, 1, False, None, False, 1.0)]
    group = Group(7, 6, members, dtype=FP64)
    actual = results(group, group.together(dropout_p=0.5))
    expected = results(group, group.apart())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-13, atol=1e-13)


def test_group_of_one_equals_the_single_call():
    group = Group(37, 48, MEMBERS[:1], dtype=FP64)
    actual, expected = results(group, group.together()), results(group, group.apart())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 2, 48), (12, 48), (48,)])
@pytest.mark.parametrize("strided", [False, True])
def test_leading_dimensions_of_x_are_kept(shape, strided):
    group = Group(12, 48, dtype=FP64)
    x = (
        torch.randn(*shape[:-1], 96, dtype=FP64)[..., ::2]
        if strided
        else torch.randn(shape).double()
    )
    group.x = x.detach().requires_grad_()
    group.dys = [torch.randn(*shape[:-1], w.shape[0], dtype=FP64) for w in group.weights]
    ys = group.together()
    assert [y.shape for y in ys] == [(*shape[:-1], w.shape[0]) for w in group.weights]
    actual, expected = results(group, ys), results(group, group.apart(impl="reference"))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


def test_one_scale_and_no_lists_are_the_defaults():
    group = Group(5, 6, dtype=FP64)
    plain = masked_lora_linear_group(group.x, group.weights, group.lora_as, group.lora_bs, scales=2)
    spelt = masked_lora_linear_group(
        group.x, group.weights, group.lora_as, group.lora_bs, [None] * 4, biases=[None] * 4,
        scales=[2.0] * 4,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain, spelt, strict=True))


# --- what is saved, and autograd etiquette

M, K = 101, 48


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("frozen", "x_kept", "ts_kept"),
    [
        (("weights", "biases"), 1, 3),  # LoRA training: x once for three adapters
        (("weights", "biases", "lora_as", "lora_bs"), 0, 2),  # the mask search: two gates
        (("weights", "biases", "lora_as", "lora_bs", "gates"), 0, 0),  # frozen
    ],
)
def test_x_is_saved_once_or_not_at_all(frozen, x_kept, ts_kept, dropout_p):
    group = Group(M, K, dtype=BF16, adapter_dtype=FP32, frozen=frozen)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        group.together(dropout_p=dropout_p)
    activations = [shape for shape in saved if shape[0] == M]
    assert activations.count((M, K)) == x_kept
    assert len(activations) - x_kept == ts_kept
    assert all(math.prod(shape) <= M * 7 for shape in activations if shape != (M, K))


def test_backward_twice_gives_the_same():
    group = Group(37, 48, dtype=BF16, adapter_dtype=FP32)
    ys, wanted = group.together(dropout_p=0.3), list(group.wanted().values())
    first = torch.autograd.grad(ys, wanted, group.dys, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(ys, wanted, group.dys)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("shape", [(12, 48), (3, 4, 48)])
def test_caller_may_change_the_outputs_in_place(shape):
    group = Group(12, 48, dtype=FP64)
    group.x = group.x.detach().view(shape).requires_grad_()
    group.dys = [dy.view(*shape[:-1], -1) for dy in group.dys]
    actual = results(group, [y.mul_(2.0) for y in group.together()])
    expected = results(group, [y * 2.0 for y in group.apart(impl="reference")])
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


def test_dys_are_not_written_to():
    group = Group(37, 48, dtype=FP32)
    before = [dy.clone() for dy in group.dys]
    results(group, group.together())
    assert all(torch.equal(a, b) for a, b in zip(group.dys, before, strict=True))


def test_second_derivatives_raise():
    group = Group(5, 6, dtype=FP64)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(group.together()[0].sum(), group.x, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_changes_nothing(use_reentrant):
    group = Group(37, 48, dtype=BF16, adapter_dtype=FP32)

    def run(x):
        return masked_lora_linear_group(x, *group.lists()[1:], dropout_p=0.3)

    leaves = [group.x, *(a for a in group.lora_as if a is not None)]
    gradients = []
    for function in (run, lambda x: checkpoint(run, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        ys = function(group.x)
        torch.manual_seed(8)
        torch.autograd.backward(ys, group.dys)
        gradients.append([leaf.grad for leaf in leaves])
        for tensor in group.wanted().values():
            tensor.grad = None
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_members_have_masks_of_their_own():
    x, w = torch.ones(64, 32), torch.zeros(16, 32)
    a, b = torch.eye(16, 32), torch.eye(16)
    first, second = masked_lora_linear_group(x, [w, w], [a, a], [b, b], dropout_p=0.5)
    assert not torch.equal(first, second)


# --- dtypes


@pytest.mark.parametrize("m", [37, 101])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast_casts_as_linear_does(m, dropout_p):
    group = Group(m, 48, dtype=FP32)
    options = options_for(dropout_p)
    with torch.autocast("cpu", BF16):
        ys = group.together(**options)
    assert {y.dtype for y in ys} == {BF16}
    wide, narrow = group.cast(FP64), group.cast(BF16)
    expected = results(wide, wide.apart(impl="reference", **options))
    eager = results(narrow, narrow.apart(impl="reference", **options))
    wanted = group.wanted()
    grads = torch.autograd.grad(ys, list(wanted.values()), [dy.to(BF16) for dy in group.dys])
    for (name, tensor), grad in zip(wanted.items(), grads, strict=True):
        assert grad.dtype == tensor.dtype == FP32
        assert_within_rounding(grad, expected[f"d{name}"], eager[f"d{name}"], name)


@pytest.mark.parametrize("m", [37, 101])
def test_autocast_around_backward_only_rounds(m):
    group = Group(m, 48, dtype=FP32)
    ys = group.together()
    with torch.autocast("cpu", BF16):
        torch.autograd.backward(ys, group.dys)
    wide, narrow = group.cast(FP64), group.cast(BF16)
    expected = results(wide, wide.apart(impl="reference"))
    eager = results(narrow, narrow.apart(impl="reference"))
    for name, tensor in group.wanted().items():
        assert tensor.grad.dtype == FP32
        assert_within_rounding(tensor.grad, expected[f"d{name}"], eager[f"d{name}"], name)


class Reads(TorchDispatchMode):
    """Counts the products that read a tensor."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.at, self.count = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        if func in products:
            read = (t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor))
            self.count += self.at in read
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dropout_p", "reads"), [(0.0, 1), (0.5, 0)])
def test_backward_reads_x_once_for_every_da(dropout_p, reads):
    """With dropout every product reads a masked x of its own."""
    group = Group(70, 32, dtype=BF16, adapter_dtype=FP32, frozen=("weights",))
    options = {"biases": group.biases, "scales": group.scales, "dropout_p": dropout_p}
    ys = masked_lora_linear_group(
        group.x, group.weights, group.lora_as, group.lora_bs, group.gates, **options
    )
    with Reads(group.x) as counted:
        torch.autograd.backward(ys, group.dys)
    assert counted.count == reads
    das = [a.grad for a in group.lora_as if a is not None]
    assert all(da.untyped_storage().nbytes() == da.nbytes for da in das)


@pytest.mark.parametrize("open_dtype", [BF16, FP32])
def test_a_gradient_holds_no_memory_of_the_others(open_dtype):
    members = [(16, 3, True, None, False, 1.0), (8, 5, True, None, False, 1.0)]
    group = Group(70, 32, members, dtype=open_dtype)
    ys = masked_lora_linear_group(group.x, group.weights, group.lora_as, group.lora_bs)
    torch.autograd.backward(ys, group.dys)
    for a in group.lora_as:
        assert a.grad.untyped_storage().nbytes() == a.grad.nbytes

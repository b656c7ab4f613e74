"""The group op with impl="triton": one pass over x, one dx; on a GPU or emulated on a CPU."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from ila_kernels import masked_lora_linear, masked_lora_linear_group, prefer, reference
from ila_kernels.dropout import draw_seed
from ila_kernels.testing import Inputs, assert_within_rounding, make_inputs

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# (N, R, open?, gate, bias, scale): grouped-query attention, ranks of their own
OPEN_FIRST = [
    (40, 4, True, 0.6, True, 2.0),
    (24, 7, True, None, False, 0.5),
    (24, 4, False, None, True, 1.0),
    (8, 1, True, 0.0, False, 1.7),
]
CLOSED_FIRST = [OPEN_FIRST[2], OPEN_FIRST[1], OPEN_FIRST[0]]
NAMES = ("x", "weight", "lora_a", "lora_b", "gate", "bias")


class Group:
    """The members of a call as ``Inputs`` of one x, on the pretended or real GPU."""

    def __init__(self, m, k, rows, *, dtype, adapter_dtype=None, requires=NAMES, wide=False):
        self.rows, self.members = rows, []
        for i, (n, r, _, gate, bias, _) in enumerate(rows):
            kinds = {"dtype": dtype, "adapter_dtype": adapter_dtype, "requires": requires}
            member = make_inputs(m, k, n, r, gate=gate, bias=bias, seed=i, **kinds, device="cuda")
            x = self.members[0].x if self.members else member.x
            # dy leans towards the update of the x that is used; see make_inputs.
            update = x.double() @ member.lora_a.double().t() @ member.lora_b.double().t()
            dy = (torch.randn(m, n, device="cuda") + update / 0.3).detach().to(dtype)
            self.members.append(replace(member, x=x, dy=dy))
        if wide:  # every dy is a slice of one wider buffer, as after a fused attention
            for i, member in enumerate(self.members):
                m, n = member.dy.shape
                buffer = member.dy.new_full((m, 2 * n), math.nan)
                self.members[i] = replace(member, dy=buffer[:, ::2].copy_(member.dy))

    def cast(self, dtype) -> "Group":
        other = object.__new__(Group)
        other.rows = self.rows
        cast = [member.cast(dtype) for member in self.members]
        other.members = [replace(member, x=cast[0].x) for member in cast]
        return other

    def wanted(self) -> dict[str, Tensor]:
        named = {}
        for i, (member, row) in enumerate(zip(self.members, self.rows, strict=True)):
            kept = NAMES if row[2] else ("x", "weight", "bias")
            named |= {
                name if name == "x" else f"{name}[{i}]": t
                for name, t in member.wanted().items()
                if name in kept
            }
        return named

    def column(self, name: str, only_open: bool = True) -> list[Tensor | None]:
        return [
            getattr(member, name) if row[2] or not only_open else None
            for member, row in zip(self.members, self.rows, strict=True)
        ]

    def run(self, dropout_p=0.0) -> tuple[Tensor, ...]:
        torch.manual_seed(7)  # what the seeds of dropout are drawn from
        return self.call(self.members[0].x, dropout_p)

    def call(self, x: Tensor, dropout_p: float) -> tuple[Tensor, ...]:
        return masked_lora_linear_group(
            x,
            self.column("weight", only_open=False),
            self.column("lora_a"),
            self.column("lora_b"),
            self.column("gate"),
            biases=self.column("bias", only_open=False),
            scales=[row[5] for row in self.rows],
            dropout_p=dropout_p,
            impl="triton",
        )

    def apart(self, keeps, dropout_p, function=reference.masked_lora_linear) -> list[Tensor]:
        ys = []
        for i, row, keep in zip(self.members, self.rows, keeps, strict=True):
            if row[2]:
                ys.append(function(
                    i.x, i.weight, i.lora_a, i.lora_b, i.gate, i.bias, row[5], keep, dropout_p
                ))  # fmt: skip
            else:
                ys.append(torch.nn.functional.linear(i.x, i.weight, i.bias))
        return ys


def results(group: Group, ys, used=None) -> dict[str, Tensor]:
    """Values, and gradients by the outputs whose places are in ``used``."""
    used, wanted = range(len(ys)) if used is None else used, group.wanted()
    used = [i for i in used if ys[i].requires_grad]
    dys = [group.members[i].dy for i in used]
    grads = torch.autograd.grad(
        [ys[i] for i in used], list(wanted.values()), dys, allow_unused=True
    )
    named = {f"y[{i}]": y.detach() for i, y in enumerate(ys)}
    return named | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def keeps_of(is_open: list[bool], m: int, k: int, p: float) -> list[Tensor | None]:
    """Masks that ``Group.run`` draws, read off t: with x = 1 and A = 1 it is keep / (1 − p).

    A closed member draws none.
    """
    if p == 0.0 or m == 0:
        return [None] * len(is_open)
    from ila_kernels.kernels.shrink import shrink

    torch.manual_seed(7)
    x, a = torch.ones(m, k, device="cuda"), torch.eye(k, device="cuda")
    seeds = iter(draw_seed(sum(is_open)).tolist())
    return [shrink(x, [a], [next(seeds)], p)[0] != 0 if opened else None for opened in is_open]


def assert_matches(group: Group, dropout_p: float = 0.0, used=None) -> dict[str, Tensor]:
    keeps = keeps_of([row[2] for row in group.rows], *group.members[0].x.shape, dropout_p)
    got = results(group, group.run(dropout_p), used)
    wide, narrow = group.cast(FP64), group.cast(group.members[0].x.dtype)
    exact = results(wide, wide.apart(keeps, dropout_p), used)
    plain = results(narrow, narrow.apart(keeps, dropout_p), used)
    wanted = group.wanted()
    for name, value in got.items():
        if exact[name] is None:
            assert value is None, name
            continue
        own = group.members[0].x if name[0] == "y" else wanted[name[1:]]
        assert value.dtype == own.dtype, name
        assert_within_rounding(value, exact[name], plain[name], name)
    return got


GRID = [
    # why, M, rows, dtype, adapter dtype, dropout, strided dy, outputs used
    ("what PEFT makes by default", 37, OPEN_FIRST, BF16, FP32, 0.0, False, None),
    ("a mask for each member", 37, OPEN_FIRST, BF16, FP32, 0.3, False, None),
    ("the closed one makes dx", 37, CLOSED_FIRST, FP16, FP16, 0.3, True, None),
    ("fp32", 37, CLOSED_FIRST, FP32, FP32, 0.0, True, None),
    ("only the first output is used", 5, OPEN_FIRST, BF16, FP32, 0.0, False, (0,)),
    ("only the closed output is used", 5, OPEN_FIRST, BF16, FP32, 0.3, False, (2,)),
    ("all but the first are used", 5, OPEN_FIRST, FP32, FP32, 0.3, False, (1, 2, 3)),
    ("several tiles of dx, the last a rim", 150, CLOSED_FIRST, BF16, FP32, 0.0, False, None),
    ("four adapters: a second pass over x", 20, OPEN_FIRST * 2, BF16, FP32, 0.3, False, None),
    ("no tokens", 0, OPEN_FIRST, BF16, FP32, 0.3, False, None),
    ("one member", 37, OPEN_FIRST[:1], BF16, FP32, 0.0, False, None),
    ("no adapters", 37, [OPEN_FIRST[2]] * 2, BF16, FP32, 0.3, False, None),
]


@pytest.mark.parametrize(
    ("m", "rows", "dtype", "adapter_dtype", "dropout_p", "wide", "used"),
    [row[1:] for row in GRID],
    ids=[row[0] for row in GRID],
)
def test_group_is_within_rounding_of_separate_layers(
    m, rows, dtype, adapter_dtype, dropout_p, wide, used
):
    k = 140 if m == 150 else 48
    group = Group(m, k, rows, dtype=dtype, adapter_dtype=adapter_dtype, wide=wide)
    assert_matches(group, dropout_p, used)


@pytest.mark.parametrize(
    "requires", [("x",), ("gate",), ("lora_a", "lora_b"), ("lora_b",), ("x", "gate"), ("bias",)]
)
def test_whatever_is_wanted_is_right(requires):
    group = Group(20, 24, OPEN_FIRST[:3], dtype=BF16, adapter_dtype=FP32, requires=requires)
    assert_matches(group, 0.3)


def test_rounding_of_dx_does_not_grow_with_the_group():
    # Ten members: dx passes through bf16 ten times.
    rows = [(24, 2, True, None, False, 1.0)] * 10
    group = Group(20, 24, rows, dtype=BF16, adapter_dtype=FP32, requires=("x",))
    assert_matches(group)


def test_a_member_equals_the_single_call_bit_for_bit():
    group = Group(37, 48, OPEN_FIRST, dtype=BF16, adapter_dtype=FP32)
    for i, (y, row) in enumerate(zip(group.run(), group.rows, strict=True)):
        z: Inputs = group.members[i]
        if row[2]:
            adapter = (z.weight, z.lora_a, z.lora_b, z.gate)
            options = {"bias": z.bias, "scale": row[5], "impl": "triton"}
            alone = masked_lora_linear(z.x, *adapter, **options)
        else:
            alone = torch.nn.functional.linear(z.x, z.weight, z.bias)
        assert torch.equal(y, alone), i


# --- what is launched


@pytest.fixture
def launches(monkeypatch):
    """Every launch as (kernel, arguments)."""
    from ila_kernels.kernels import selfcheck
    from ila_kernels.kernels.launch import Launch

    selfcheck.ensure(torch.device("cuda", 0))
    seen, run = [], Launch.run

    def spy(self):
        seen.append((self.kernel.fn.__name__.removeprefix("_"), self.arguments))
        run(self)

    monkeypatch.setattr(Launch, "run", spy)
    return seen


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_pass_over_x_serves_every_adapter(launches, dropout_p):
    group = Group(37, 48, OPEN_FIRST, dtype=BF16, adapter_dtype=FP32)
    group.run(dropout_p)
    # The members differ in their gates and biases, so their outputs are launched one by one.
    assert [name for name, _ in launches] == ["shrink"] + ["lowrank_gemm"] * 3
    assert launches[0][1]["ranks"] == (4, 7, 1)
    assert len({launches[0][1][f"seed{i}"] for i in range(3)}) == (3 if dropout_p else 1)


QKV = [(136, 4, True, 0.6, True, 2.0), (72, 7, True, 0.0, True, 0.5), (80, 1, True, 2.0, True, 1.0)]
SAME = [(n, r, True, None, False, scale) for n, r, _, _, _, scale in QKV]


@pytest.mark.parametrize("rows", [QKV, SAME[:2], [*SAME, (68, 3, True, None, False, 1.0)]])
# Not fp32: the emulator leaves those products to a library whose order of sums follows the layout.
@pytest.mark.parametrize(("dtype", "m"), [(BF16, 150), (FP16, 20)])
def test_outputs_of_one_launch_have_the_bits_of_a_launch_each(launches, rows, dtype, m):
    from ila_kernels.group import Member
    from ila_kernels.kernels import joined_gemm

    inputs = Group(m, 72, rows, dtype=dtype, adapter_dtype=FP32, requires=()).members
    x, ts = inputs[0].x, [torch.randn(m, row[1], device="cuda").to(dtype) for row in rows]
    members = [
        Member(i.weight, i.lora_a, i.lora_b, i.gate, i.bias, None, row[5])
        for i, row in zip(inputs, rows, strict=True)
    ]
    ys = joined_gemm.outputs(x, members, ts)
    joined = [len(z["c_ptrs"]) for name, z in launches if name == "joined_gemm"]
    assert joined == [min(len(rows), 3)]
    assert len(launches) == 1 + max(0, len(rows) - 3)
    for y, z, t in zip(ys, members, ts, strict=True):
        alone = (x, z.weight.t(), t, z.lora_b.t(), z.scale, z.gate, z.bias)
        assert torch.equal(y, joined_gemm.lowrank_gemm(*alone))


def test_what_cannot_share_a_launch_has_its_own(launches):
    # Another tile (N fills half of one), W by columns, B by columns, a gate in one of the two.
    narrow = [SAME[0], (40, *SAME[1][1:])]
    for rows, change in (
        (narrow, None),
        (SAME[:2], "weight"),
        (SAME[:2], "lora_b"),
        (SAME[:2], "gate"),
    ):
        group = Group(150, 72, rows, dtype=BF16, adapter_dtype=FP32, requires=())
        if change in ("weight", "lora_b"):
            value = getattr(group.members[1], change)
            group.members[1] = replace(group.members[1], **{change: value.t().contiguous().t()})
        elif change:
            gate = torch.tensor([0.5], device="cuda")
            group.members[1] = replace(group.members[1], gate=gate)
        launches.clear()
        group.run()
        assert [name for name, _ in launches] == ["shrink", "lowrank_gemm", "lowrank_gemm"], change


def test_every_member_adds_to_the_same_dx(launches):
    frozen = ("x", "lora_a", "lora_b")
    group = Group(37, 48, OPEN_FIRST, dtype=BF16, adapter_dtype=FP32, requires=frozen)
    ys = group.run()
    launches.clear()
    dx = results(group, ys)["dx"]
    gemms = [arguments for name, arguments in launches if name == "lowrank_gemm"]
    assert [z["ACCUMULATE"] for z in gemms] == [False, True, True]
    assert {z["c_ptr"].data_ptr() for z in gemms} == {dx.data_ptr()}


def test_the_persistent_form_adds_to_dx_too(launches):
    pytest.importorskip("triton.tools.tensor_descriptor")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors are for sm_90 and newer")
    rows = [(72, 4, True, 0.6, True, 2.0), (80, 4, True, None, False, 0.5)]
    group = Group(150, 72, rows, dtype=BF16, adapter_dtype=FP32, requires=("x",))
    prefer(gemm="persistent")
    try:
        assert_matches(group, 0.3)
    finally:
        prefer()
    forms = [(z["PERSISTENT"], z["ACCUMULATE"]) for _, z in launches if "ACCUMULATE" in z]
    assert forms[-2:] == [(True, False), (True, True)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_draws_the_masks_of_the_group_again(plain_tensors, use_reentrant):
    group = Group(37, 48, OPEN_FIRST, dtype=BF16, adapter_dtype=FP32)
    expected = results(group, group.run(0.3))
    torch.manual_seed(7)
    ys = checkpoint(group.call, group.members[0].x, 0.3, use_reentrant=use_reentrant)
    torch.manual_seed(8)  # what runs in between draws on
    torch.autograd.backward(ys, [member.dy for member in group.members])
    for name, tensor in group.wanted().items():
        assert torch.equal(tensor.grad, expected[f"d{name}"]), name


def test_two_runs_give_the_same_bits():
    group = Group(37, 48, OPEN_FIRST, dtype=BF16, adapter_dtype=FP32)
    first, second = (results(group, group.run(0.3)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

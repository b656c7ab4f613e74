import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import traffic
from ila_kernels import masked_lora_linear
from ila_kernels.config import rows_per_program
from ila_kernels.roofline import (
    CEILINGS,
    CONTESTANTS,
    PARAMETERS,
    Ceiling,
    Problem,
    backward_cost,
    ceiling_of,
    forward_cost,
    group_backward_cost,
    group_forward_cost,
    saved_bytes,
    time_bound_ms,
)
from ila_kernels.testing import Inputs, make_inputs

M, K, N, R = 37, 48, 40, 4  # no two alike and no powers of two: a swapped letter shows
P = Problem(M, K, N, R)
TRAINING = frozenset({"x", "lora_a", "lora_b"})


def counter() -> FlopCounterMode:
    def addmm_(c_shape, a_shape, b_shape, **_):  # torch counts addmm, but not addmm_
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def ours(i: Inputs, dropout_p: float = 0.0) -> torch.Tensor:
    return masked_lora_linear(
        i.x, i.weight, i.lora_a, i.lora_b, i.gate, bias=i.bias, dropout_p=dropout_p
    )


def peft(i: Inputs, dropout_p: float = 0.0) -> torch.Tensor:
    base = torch.nn.functional.linear(i.x, i.weight, i.bias)
    x_hat = torch.nn.functional.dropout(i.x, dropout_p)
    return base + torch.nn.functional.linear(x_hat @ i.lora_a.t(), i.lora_b) * 2.0


def frozen(i: Inputs, dropout_p: float = 0.0) -> torch.Tensor:
    return torch.nn.functional.linear(i.x, i.weight, i.bias)


NEEDS = {
    "frozen": frozenset(),
    "x only: a frozen layer above an open one": {"x"},
    "all": PARAMETERS,
    "LoRA training": TRAINING,
    "A and B in the lowest layer, where no dx is wanted": {"lora_a", "lora_b"},
    "A only": {"lora_a"},
    "B only": {"lora_b"},
    "gate only: the mask search in its lowest layer": {"gate"},
    "gate and x: the mask search elsewhere": {"gate", "x"},
    "full fine-tuning beside LoRA": {"weight", "bias", "lora_a", "lora_b"},
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize(
    ("contestant", "function"), [("addmm", ours), ("peft", peft), ("frozen", frozen)]
)
def test_flops_are_those_that_run(contestant, function, needs, dropout_p):
    gate = 0.5 if contestant == "addmm" else None
    inputs = make_inputs(M, K, N, R, dtype=torch.float32, gate=gate, bias=True, requires=needs)
    p = dataclasses.replace(P, dropout=dropout_p > 0)
    with counter() as forward:
        y = function(inputs, dropout_p)
    assert forward.get_total_flops() == forward_cost(contestant, p).flops
    with counter() as backward:
        if y.requires_grad:
            y.backward(inputs.dy)
    assert backward.get_total_flops() == backward_cost(contestant, p, needs).flops


@pytest.mark.parametrize(
    ("contestant", "forward", "backward"),
    [
        ("frozen", (0, 0), (0, 0)),
        ("peft", (1, 6), (5, 4)),
        ("addmm", (1, 2), (3, 2)),
        ("hybrid", (1, 2), (3, 1)),
        ("fused", (1, 0), (1, 1)),
    ],
)
def test_extra_traffic_for_small_rank_is_what_the_module_says(contestant, forward, backward):
    # R = 0 removes every R-thin tensor, so the elements must come out exactly.
    p = dataclasses.replace(P, r=0, base_bytes=2, adapter_bytes=2)
    for (mk, mn), cost, bare in (
        (forward, forward_cost(contestant, p), forward_cost("frozen", p)),
        (backward, backward_cost(contestant, p, TRAINING), backward_cost("frozen", p, TRAINING)),
    ):
        assert cost.bytes - bare.bytes == 2 * (mk * M * K + mn * M * N)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("adapter_bytes", [2, 4])
def test_fused_moves_least_and_peft_most(needs, dropout, adapter_bytes):
    needs = needs - {"gate"}  # peft has none: compare what all of them compute
    # A real layer: at P's size the shares of the sums weigh as much as x and dy.
    p = Problem(8192, 4096, 4096, 16, dropout=dropout, adapter_bytes=adapter_bytes)
    # Those of dA are counted of ours alone: how a library splits its sum over M is its own affair.
    shares = 8 * p.r * p.k * -(-p.m // rows_per_program(p.m, p.k)) * ("lora_a" in needs)
    for cost, own in (
        (lambda c: forward_cost(c, p), 0),
        (lambda c: backward_cost(c, p, needs), shares),
    ):
        moved = {contestant: cost(contestant).bytes for contestant in CONTESTANTS}
        assert moved["frozen"] <= moved["fused"] - own <= min(moved["addmm"], moved["peft"])
        assert moved["fused"] <= moved["hybrid"] <= moved["addmm"] + own
        if not dropout:  # with it addmm redraws the mask instead of saving x̂
            assert moved["addmm"] <= moved["peft"]


def test_mask_search_reads_dy_once_and_never_x():
    moved = [
        backward_cost("fused", dataclasses.replace(P, k=k), {"gate"}).bytes for k in (K, 2 * K)
    ]
    assert moved[0] == moved[1] == 2 * (M * N + M * R) + 4 * R * N


def test_dropout_costs_the_fused_kernels_no_byte():
    p = dataclasses.replace(P, dropout=True)
    assert forward_cost("fused", p) == forward_cost("fused", P)
    assert backward_cost("fused", p, TRAINING) == backward_cost("fused", P, TRAINING)


def test_parts_of_k_cost_their_shares():
    # Few rows at R = 64: four parts of K, each an fp32 share of t that is written and read.
    few, many = Problem(2048, 4096, 1024, 64), Problem(8192, 4096, 1024, 64)
    bytes_of = [forward_cost("fused", p).bytes for p in (few, many)]
    weights = 2 * 4096 * 1024 + 4 * 64 * (4096 + 1024)
    assert 4 * (bytes_of[0] - weights - 8 * 4 * 2048 * 64) == bytes_of[1] - weights


@pytest.mark.parametrize("r", [8, 16, 32, 64])
def test_u_and_db_never_move_more_than_two_reads_of_dy(r):
    p = Problem(8192, 4096, 4096, r)
    apart = sum(backward_cost("fused", p, {word}).bytes for word in ("gate", "lora_b"))
    thin = 2 * p.base_bytes * p.m * r + 8 * 8 * r * p.n  # t, and shares of dB for 8 stretches
    assert backward_cost("fused", p, {"gate", "lora_b"}).bytes <= apart + thin


def test_a_group_of_one_costs_what_it_costs_alone():
    for contestant in CONTESTANTS:
        assert group_forward_cost(contestant, [P]) == forward_cost(contestant, P)
        cost = group_backward_cost(contestant, [P], TRAINING)
        assert cost == backward_cost(contestant, P, TRAINING)


@pytest.mark.parametrize(
    ("contestant", "dropout", "passes"),
    [
        ("fused", False, 1),
        ("fused", True, 1),
        ("hybrid", True, 1),
        ("addmm", False, 1),
        ("addmm", True, 3),
        ("peft", True, 3),
    ],
)
def test_a_group_reads_x_for_t_once_where_it_can(contestant, dropout, passes):
    p = dataclasses.replace(P, dropout=dropout)
    apart = 3 * forward_cost(contestant, p).bytes
    assert apart - group_forward_cost(contestant, [p] * 3).bytes == 2 * M * K * (3 - passes)


@pytest.mark.parametrize("contestant", ["addmm", "hybrid", "fused", "peft"])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_group_reads_x_for_da_once_where_it_can(contestant, dropout):
    p = dataclasses.replace(P, dropout=dropout)
    needs = {"lora_a", "lora_b"}
    apart = 3 * backward_cost(contestant, p, needs).bytes
    together = group_backward_cost(contestant, [p] * 3, needs).bytes
    once = contestant in ("hybrid", "fused") or (contestant == "addmm" and not dropout)
    # addmm writes the u's beside each other before that.
    beside = 3 * 2 * 2 * M * p.r if contestant == "addmm" else 0
    assert apart - together == (2 * M * K * 2 - beside if once else 0)


@pytest.mark.parametrize(("dropout", "passes"), [(False, 1 + 3), (True, 1 + 2 * 2 + 3)])
def test_a_group_of_hybrid_passes_over_one_dx(dropout, passes):
    """Its update is written at once, or masked and added member by member; each GEMM adds to it."""
    # R = 0 leaves dy, W and dx; each GEMM writes dx, which the bare linears do as well.
    p = dataclasses.replace(P, r=0, dropout=dropout)
    moved = group_backward_cost("hybrid", [p] * 3, {"x"}).bytes
    bare = 3 * backward_cost("frozen", p, {"x"}).bytes + 3 * 2 * M * N  # dy again, for u
    assert moved - bare == passes * 2 * M * K


def test_a_fourth_adapter_is_a_second_pass_over_x():
    apart = 4 * forward_cost("fused", P).bytes
    assert apart - group_forward_cost("fused", [P] * 4).bytes == 2 * M * K * 2


def test_empty_input_costs_no_flops():
    p = dataclasses.replace(P, m=0)
    for contestant in CONTESTANTS:
        assert forward_cost(contestant, p).flops == 0
        assert backward_cost(contestant, p, PARAMETERS).flops == 0


def test_wrong_words_are_named():
    with pytest.raises(ValueError, match=r"contestant must be one of .*'peft'.*, got 'unsloth'"):
        forward_cost("unsloth", P)
    with pytest.raises(ValueError, match=r"needs must be among .*'lora_a'.*, got \['A'\]"):
        backward_cost("fused", P, {"A"})


@pytest.mark.parametrize(
    "name",
    # Neighbours of listed GPUs with other peaks, and what was never heard of.
    ["NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU", "A new one", ""],
)
def test_unknown_gpu_has_no_ceiling(name):
    assert ceiling_of(name) is None


def test_ceilings_are_facts_that_nobody_edits():
    assert ceiling_of(" NVIDIA H200\n") == CEILINGS["NVIDIA H200"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        CEILINGS["NVIDIA L4"].bf16_tflops = 1.0


def test_time_bound_is_the_slower_of_the_two():
    ceiling = Ceiling(bf16_tflops=100.0, memory_gb_s=1000.0)
    assert time_bound_ms(2e11, 0, ceiling) == pytest.approx(2.0)
    assert time_bound_ms(2e11, 3e9, ceiling) == pytest.approx(3.0)
    assert time_bound_ms(0, 0, ceiling) == 0.0


# ---- what forward keeps


def counted(run, inputs: list[torch.Tensor]) -> int:
    """Bytes that autograd holds after a forward, each storage once, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in inputs[1:]}
    held: dict[int, int] = {}

    def pack(t):
        if t.device.type == "cpu" and t.numel() > 1:  # seeds are one integer each
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        keep.append(t)  # no storage is freed and used again while we count
        return t

    keep: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep.append(run(inputs))
    return sum(size for at, size in held.items() if at not in own)


ROWS = 80  # more than eager.SHORT_ROWS, where overheads decide and tensors may be wider
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@pytest.mark.parametrize("needs", [set(), {"x"}, TRAINING, {"lora_a", "lora_b"}, {"x", "lora_b"},
                                   {"x", "weight"}, {"lora_a"}])  # fmt: skip
@pytest.mark.parametrize(("base", "adapter"), [(8, 8), (2, 4), (4, 4)])
@pytest.mark.parametrize("contestant", ["frozen", "peft", "addmm"])
def test_saved_bytes_are_those_that_autograd_holds(contestant, base, adapter, needs):
    x = torch.randn(ROWS, K, dtype=DTYPES[base])
    weight = torch.randn(N, K, dtype=DTYPES[base])
    a, b = torch.randn(R, K, dtype=DTYPES[adapter]), torch.randn(N, R, dtype=DTYPES[adapter])
    for name, tensor in (("x", x), ("weight", weight), ("lora_a", a), ("lora_b", b)):
        tensor.requires_grad_(name in needs)

    def run(inputs):
        x, weight, a, b = inputs
        if contestant == "addmm":
            return masked_lora_linear(x, weight, a, b, scale=2.0)
        y = torch.nn.functional.linear(x, weight)
        if contestant == "frozen":
            return y
        return y + torch.nn.functional.linear(x.to(a.dtype) @ a.t(), b) * 2.0

    p = Problem(ROWS, K, N, R, base, adapter)
    assert counted(run, [x, weight, a, b]) == saved_bytes(contestant, p, needs)


def test_dropout_keeps_nothing_more_of_ours_and_two_copies_of_peft():
    p = Problem(ROWS, K, N, R, 2, 4)
    dropped = dataclasses.replace(p, dropout=True)
    assert saved_bytes("addmm", dropped, TRAINING) == saved_bytes("addmm", p, TRAINING)
    extra = saved_bytes("peft", dropped, TRAINING) - saved_bytes("peft", p, TRAINING)
    assert extra == ROWS * K  # the mask; x was copied to float32 before
    x = torch.randn(ROWS, K, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(N, K, dtype=torch.bfloat16)
    a, b = torch.randn(R, K).requires_grad_(), torch.randn(N, R).requires_grad_()

    def run(inputs):
        return masked_lora_linear(*inputs, dropout_p=0.3)

    assert counted(run, [x, weight, a, b]) == saved_bytes("addmm", dropped, TRAINING)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_table_of_traffic_covers_every_layer_and_ours_moves_least(dropout, tmp_path, capsys):
    file = tmp_path / "traffic.json"
    traffic.main(["--json", str(file), *(["--dropout"] if dropout else [])])
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert len(rows) == 3 * 4 * len(CONTESTANTS)
    assert capsys.readouterr().out.count("\n") == 2 + 3 * 4
    for i in range(0, len(rows), len(CONTESTANTS)):
        layer = rows[i : i + len(CONTESTANTS)]
        moved = {row["contestant"]: row["forward_bytes"] + row["backward_bytes"] for row in layer}
        assert moved["frozen"] < moved["addmm"] < moved["peft"] or dropout
        assert moved["fused"] < moved["hybrid"] < moved["addmm"]
        # The outputs of one launch read x once, where frozen linears read it one by one.
        assert moved["frozen"] < moved["fused"] or layer[0]["layer"] in ("q k v", "gate up")
        assert moved["fused"] < min(moved["addmm"], moved["peft"])

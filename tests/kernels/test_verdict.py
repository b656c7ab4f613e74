"""The rule of a verdict, the look-up, and the choice of ``impl="auto"`` from both."""

import dataclasses
import json

import pytest
import torch

from ila_kernels import choice, config, functional, masked_lora_linear, prefer, use_verdicts
from ila_kernels.choice import Call, Preference, gpu_impl
from ila_kernels.config import resolve_impl
from ila_kernels.device import call_of, call_on
from ila_kernels.verdict import Cell, Machine, Verdict, Verdicts, decide

MACHINE = Machine("a GPU", "12080", "12.8", "2.13.0", "3.9.0", "0.1")
CELL = Cell(2048, 4096, (4096,), 16, "bfloat16", "float32", False)
CALL = Call(2048, 4096, (4096,), 16, "bfloat16", "float32", False, "a GPU")
EAGER = (1.0,) * 7


def verdict(cell: Cell = CELL, machine: Machine = MACHINE, **ms: float) -> Verdict:
    """Steady times: eager 1.0 in every round, the others as given."""
    return Verdict(
        machine, cell, {"eager": EAGER, **{n: (t,) * 7 for n, t in ms.items()}}, "2026-01-31"
    )


@pytest.fixture(autouse=True)
def nothing_set():
    yield
    prefer()
    use_verdicts([])


# --- the rule


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ({}, "eager"),
        ({"hybrid": (0.96,) * 7}, "hybrid"),
        ({"hybrid": (0.98,) * 7}, "eager"),  # a near-tie
        ({"hybrid": (1.0,) * 7}, "eager"),  # a tie
        ({"hybrid": (0.9,) * 5 + (1.5,) * 2}, "hybrid"),  # 5 of 7
        ({"hybrid": (0.1,) * 4 + (0.98,) * 3}, "eager"),  # 4 of 7, however fast these were
        ({"triton": (0.5,) * 7}, "triton"),
        ({"hybrid": (0.9,) * 7, "triton": (0.88,) * 7}, "hybrid"),  # triton's lead is a near-tie
        ({"hybrid": (0.9,) * 7, "triton": (0.8,) * 7}, "triton"),
        ({"hybrid": (1.2,) * 7, "triton": (0.9,) * 7, "persistent": (0.7,) * 7}, "persistent"),
    ],
)
def test_a_candidate_wins_by_more_than_3_percent_in_5_of_7_rounds(ms, chosen):
    assert decide({"eager": EAGER, **ms}) == chosen
    # What the clock counts in is no part of the rule.
    every = {"eager": EAGER, **ms}
    scaled = {name: tuple(1000 * t for t in times) for name, times in every.items()}
    assert decide(scaled) == chosen


# --- the look-up


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (None, "hybrid"),
        (2048, "triton"),
        (512, "triton"),
        (511, None),
        (4096, "triton"),  # the geometric mean of both
        (4097, "hybrid"),
        (32768, "hybrid"),
        (32769, None),
        (1, None),
        (0, None),
    ],
)
def test_the_nearest_rows_count_up_to_a_factor_of_four(rows, chosen):
    many, few = (dataclasses.replace(CELL, rows=m) for m in (8192, 2048))
    verdicts = Verdicts([verdict(many, hybrid=0.5), verdict(few, triton=0.5)])
    picked = verdicts.find("a GPU", CELL.key, rows)
    assert (picked and picked.any_form[0]) == chosen


def test_between_rows_far_apart_nothing_is_claimed():
    cells = [dataclasses.replace(CELL, rows=m) for m in (128, 8192)]
    verdicts = Verdicts([verdict(cell, hybrid=0.5) for cell in cells])
    found = [verdicts.find("a GPU", CELL.key, m) is not None for m in (128, 512, 513, 2047, 2048)]
    assert found == [True, True, False, False, True]


def test_the_later_of_two_measurements_counts():
    verdicts = Verdicts([verdict(hybrid=0.5), verdict(hybrid=2.0)])
    assert len(verdicts.all) == 1
    assert gpu_impl(CALL, verdicts=verdicts)[0] == "eager"


@pytest.mark.parametrize(
    "change",
    [
        {"k": 4097},
        {"ns": (4095,)},
        {"r": 17},
        {"dtype": "float16"},
        {"adapter_dtype": "bfloat16"},
        {"dropout": True},
        {"gpu": "another GPU"},
        {"m": 1},
    ],
)
def test_another_call_is_not_measured(change):
    verdicts = Verdicts([verdict(hybrid=0.5)])
    chosen, why = gpu_impl(CALL._replace(**change), verdicts=verdicts)
    assert chosen == "eager"
    assert "not measured" in why


def test_ranks_of_one_block_are_one():
    call, verdicts = CALL._replace(r=3), Verdicts([verdict(hybrid=0.5)])
    assert gpu_impl(call, verdicts=verdicts)[0] == "hybrid"


def test_a_group_goes_by_its_own_measurement_or_by_its_widest_layer():
    call = CALL._replace(ns=(4096, 1024, 1024))
    alone = verdict(hybrid=0.5)
    assert gpu_impl(call, verdicts=Verdicts([alone]))[0] == "hybrid"
    together = verdict(dataclasses.replace(CELL, ns=call.ns), hybrid=2.0)
    assert gpu_impl(call, verdicts=Verdicts([alone, together]))[0] == "eager"


# --- the choice


def test_the_order_is_preference_verdict_shipped_eager(monkeypatch):
    measured = Verdicts([verdict(hybrid=0.5)])
    monkeypatch.setattr(choice, "SHIPPED", Verdicts([verdict(triton=0.5)]))
    assert gpu_impl(CALL, Preference(auto="eager"), measured)[0] == "eager"
    assert gpu_impl(CALL, Preference(), measured)[0] == "hybrid"
    assert gpu_impl(CALL, Preference(), Verdicts())[0] == "triton"
    monkeypatch.setattr(choice, "SHIPPED", Verdicts())
    assert gpu_impl(CALL, Preference(), Verdicts())[0] == "eager"


def test_pointers_preferred_rule_out_the_persistent_form():
    measured = Verdicts([verdict(triton=0.9, persistent=0.7)])
    assert gpu_impl(CALL, verdicts=measured)[0] == "persistent"
    assert gpu_impl(CALL, Preference(gemm="pointer"), measured)[0] == "triton"


def test_the_reason_quotes_the_measurement(monkeypatch):
    monkeypatch.setattr(config, "has_triton", lambda: True)
    use_verdicts([verdict(hybrid=0.875, triton=0.99)])
    chosen, why = resolve_impl("auto", "cuda", CALL)
    assert chosen == "hybrid"
    assert why == (
        "auto: measured on 2026-01-31, 4096 → 4096 at 2048 rows: 0.88 of eager's time, "
        "faster in 7 of 7 rounds"
    )
    use_verdicts([verdict(hybrid=0.99)])
    chosen, why = resolve_impl("auto", "cuda", CALL)
    assert chosen == "eager"
    assert "nothing beat it by 3 % (hybrid 0.99 of its time)" in why


def test_a_verdict_for_kernels_without_triton_is_eager(monkeypatch):
    monkeypatch.setattr(config, "has_triton", lambda: False)
    use_verdicts([verdict(hybrid=0.5)])
    chosen, why = resolve_impl("auto", "cuda", CALL)
    assert (chosen, why) == ("eager", "auto: library GEMMs; triton is not installed")


def test_the_form_of_the_gemm_holds_inside_the_with_only():
    prefer(auto="triton", gemm="pointer")
    with choice.gemm_form("persistent"):
        assert choice.preference() == Preference("triton", "persistent")
    assert choice.preference() == Preference("triton", "pointer")


def _call_as_on_a_gpu(impl, x, weights, lora_as, dropout_p):
    m = None if torch.compiler.is_compiling() else x.shape[0]
    call = call_on("a GPU", weights, lora_as, m, x.dtype, dropout_p)
    return resolve_impl(impl, "cuda", call)[0]


def test_a_call_is_described_by_its_layers_with_an_adapter():
    weights = [torch.empty(n, 24) for n in (20, 30, 40)]
    lora_as = [torch.empty(4, 24), None, torch.empty(8, 24, dtype=torch.bfloat16)]
    call = call_on("a GPU", weights, lora_as, 5, torch.float16, 0.1)
    assert call == Call(5, 24, (20, 40), 8, "float16", "float32", True, "a GPU")
    assert call_of(weights, lora_as, 5, torch.float16) is None  # not on a GPU
    assert gpu_impl(call_on("a GPU", weights, [None] * 3, 5, torch.float16, 0.0))[0] == "eager"


def test_one_compiled_graph_holds_for_many_numbers_of_rows(monkeypatch):
    """Eager by verdict, so that it runs here; the look-up is the same for every implementation."""
    monkeypatch.setattr(functional, "_chosen", _call_as_on_a_gpu)
    cells = [Cell(m, 24, (20,), 4, "float32", "float32", False) for m in (64, 256, 1024)]
    use_verdicts([verdict(cell, hybrid=1.0) for cell in cells])
    graphs = []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    weight, a, b = torch.randn(20, 24), torch.randn(4, 24), torch.randn(20, 4)
    compiled = torch.compile(
        lambda x: masked_lora_linear(x, weight, a, b),
        fullgraph=True,
        dynamic=True,
        backend=counting,
    )
    torch._dynamo.reset()
    for m in (70, 101, 333):
        x = torch.randn(m, 24)
        assert torch.equal(compiled(x), masked_lora_linear(x, weight, a, b, impl="eager"))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_forward_reads_no_file_and_no_environment(monkeypatch):
    use_verdicts([verdict(hybrid=0.5)])
    monkeypatch.setattr(functional, "_chosen", _call_as_on_a_gpu)
    x, w = torch.randn(70, 24, requires_grad=True), torch.randn(20, 24)
    a, b = torch.randn(4, 24), torch.randn(20, 4)
    for opener in ("builtins.open", "io.open", "os.open", "os.getenv", "pathlib.Path.glob"):
        monkeypatch.setattr(opener, lambda *_, **__: pytest.fail("a forward looks outside"))
    masked_lora_linear(x, w, a, b).sum().backward()
    assert x.grad is not None


# --- the file's form


def test_a_verdict_is_read_as_it_was_written():
    before = dataclasses.replace(verdict(hybrid=0.5), left_out={"persistent": "no descriptors"})
    assert Verdict.from_json(json.loads(json.dumps(before.to_json()))) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "format must be 'ila.verdict', got 'another'"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"machine": {"gpu": "a GPU"}}, "machine must be an object of"),
        ({"cell": None}, "cell must be an object of"),
        ({"ms": {"hybrid": [1.0]}}, "ms must hold the rounds of eager"),
        ({"ms": {"eager": [1.0], "hybrid": [1.0, 2.0]}}, "ms must hold the rounds of eager"),
        ({"ms": {"eager": [1.0], "magic": [1.0]}}, "ms must hold the rounds of eager"),
        ({"ms": {"eager": [-1.0]}}, "positive finite numbers"),
        ({"ms": {"eager": ["fast"]}}, "positive finite numbers"),
        ({"ms": {"eager": []}}, "ms must hold the rounds of eager"),
        ({"left_out": None}, "left_out must be an object"),
    ],
)
def test_another_form_is_refused_by_what_is_wrong(change, message):
    data = json.loads(json.dumps(verdict(hybrid=0.5).to_json())) | change
    with pytest.raises(ValueError, match=message):
        Verdict.from_json(data)
    with pytest.raises(ValueError, match="a verdict must be an object, got list"):
        Verdict.from_json([])


def test_the_sizes_of_a_cell_are_positive_integers():
    data = json.loads(json.dumps(verdict().to_json()))
    for wrong in ({"rows": 0}, {"k": "4096"}, {"ns": [0]}, {"ns": 4096}, {"r": 1.5}):
        with pytest.raises(ValueError, match="sizes of the cell must be positive integers"):
            Verdict.from_json(data | {"cell": data["cell"] | wrong})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Machine)])
def test_every_version_is_part_of_the_digest(field):
    assert dataclasses.replace(MACHINE, **{field: "another"}).digest() != MACHINE.digest()

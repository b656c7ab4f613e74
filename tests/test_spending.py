"""Budgets in words, rates fitted to steps, and what a budget buys of a mask."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ila.masks.mask import LayerMask
from ila.masks.names import KINDS
from ila.price.budget import TIME, Budget, Spending
from ila.price.costs import Work
from ila.price.shapes import Shape
from ila.price.speed import Speed, fit, step_table, works
from ila.reports.pareto import pareto_figure

SHAPE = Shape(
    blocks=3, hidden=64, mlp=160, heads=4, kv_heads=2, head_dim=16, vocabulary=500, tied=True,
    rank=4, rows=2, length=32,
)  # fmt: skip
NAMES = [f"layers.{block}.{kind}" for block in range(SHAPE.blocks) for kind in KINDS]
SPEED = Speed(fixed_ms=3.0, per_flop_ms=1e-8, per_byte_ms=1e-7, per_layer_ms=0.01)


def mask_of(scores: list[float]) -> LayerMask:
    return LayerMask(dict(zip(NAMES, scores, strict=True)))


def spending(text: str, mask: LayerMask) -> Spending:
    budget = Budget.parse(text)
    return Spending(mask, budget, SHAPE, SPEED if budget.resource == TIME else None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time", "budget time must be a share such as 0.6"),
        ("time=0.6s", "budget time must be a share such as 0.6"),
        ("time=60%", "budget time must be a share such as 0.6"),
        ("time=1.2", "a share of the step with all layers open, got '1.2'"),
        ("time=0", "must be in (0, 1]"),
        ("time=-1", "budget time must be a share"),
        ("memory=12", "a number in MiB, GiB, TiB, MB, GB, TB (memory=12GiB), got '12'"),
        ("memory=12Gib", "got '12Gib'"),
        ("memory=0GiB", "must be > 0"),
        ("parameters=1B", "a number in k, M, G (parameters=1M), got '1B'"),
        ("energy=3", "must be like time=0.6, memory=12GiB, parameters=1M, got 'energy=3'"),
        ("", "must be like"),
    ],
)
def test_a_budget_that_cannot_be_read_says_what_can(text, said):
    with pytest.raises(ValueError) as error:
        Budget.parse(text)
    assert said in str(error.value)


@settings(max_examples=20)
@given(
    scores=st.lists(st.floats(-1, 3, width=16), min_size=len(NAMES), max_size=len(NAMES)),
    text=st.sampled_from(["time=0.5", "time=0.8", "memory=0.6MiB", "parameters=9k"]),
)
def test_nothing_plain_within_the_budget_beats_what_is_chosen(scores, text):
    if max(scores) <= 0:
        return
    found = spending(text, mask_of(scores))
    limit = found.budget.amount * found.unit
    if found.frontier.point(0).cost > limit:
        with pytest.raises(ValueError, match="below the cheapest possible"):
            found.chosen()
        return
    best = found.chosen()
    assert best.cost <= limit and all(found.mask.scores[name] > 0 for name in best.opened)
    rivals = [p for p in found.plain if p.cost <= limit]
    # Half-precision scores add up without rounding in fp64, in any order.
    assert all(best.importance >= p.importance for p in rivals)
    assert found.plain_within() == (rivals[-1] if rivals else None)


def test_an_impossible_budget_names_the_cheapest_set():
    scores = [1.0] * len(NAMES)
    scores[9] = 2.0  # v_proj of block 1: no other costs as little and matters as much
    found = spending("parameters=1", mask_of(scores))
    with pytest.raises(ValueError, match=r"possible, 0\.000 M parameters: layers\.1\.v_proj alone"):
        found.chosen()


def test_time_with_all_layers_open_is_one():
    found = spending("time=1", mask_of([float(i + 1) for i in range(len(NAMES))]))
    assert found.described(found.chosen()) == {
        "layers": len(NAMES), "time": 1.0, "importance": 231.0, "importance_share": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="needs speed"):
        replace(found, speed=None).chosen()
    with pytest.raises(ValueError, match="or one of"):
        replace(found, speed="a fast one").chosen()


def test_a_fit_finds_the_rates_that_made_the_times(tmp_path):
    sets = [set(NAMES), *({n} for n in NAMES[::4]), set(NAMES[7:]), set(NAMES[10:14])]
    amounts = works(SHAPE, NAMES, sets)
    found = fit(amounts, [SPEED.milliseconds(work) for work in amounts])
    assert found.worst_error < 1e-9
    for name in ("fixed_ms", "per_flop_ms", "per_byte_ms", "per_layer_ms"):
        assert getattr(found, name) == pytest.approx(getattr(SPEED, name), rel=1e-6)
    where = {"device": "cpu", "rows": 2, "length": 8, "rank": 4}
    whole = replace(found, measured=where)
    whole.save(tmp_path / "speed.json")
    assert Speed.load(tmp_path / "speed.json") == whole


def test_time_pays_for_the_labels_of_a_step_alone():
    """Head and loss cost what fewer labels saved; a mask's layers cost what they did."""
    speed = SPEED.with_head(1.2, labels=62, fewer=6)
    whole = [set(NAMES), {NAMES[-1]}]
    by_share = {}
    for answers in (1.0, 0.25):
        shape = replace(SHAPE, answers=answers)
        table = step_table(shape, NAMES, speed)
        by_share[answers] = [table.cost(opened) for opened in whole]
    saved = 0.75 * SHAPE.tokens * 1.2 / 56 * 1e9
    for full, less in zip(*by_share.values(), strict=True):
        assert full - less == pytest.approx(saved, abs=2)
    assert by_share[0.25][1] / by_share[0.25][0] < by_share[1.0][1] / by_share[1.0][0]
    kept = SPEED.with_head(-0.3, labels=62, fewer=6)
    assert kept == SPEED
    everything = SPEED.with_head(1e6, labels=62, fewer=6)
    assert everything.fixed_ms == pytest.approx(0.0) and everything.per_label_ms > 0


def test_a_rate_is_never_negative_and_four_steps_are_too_few():
    amounts = [Work(flops, 0, 10 - flops) for flops in range(1, 8)]
    found = fit(amounts, [100.0 - 5 * work.flops for work in amounts])
    assert min(found.fixed_ms, found.per_flop_ms, found.per_layer_ms) >= 0
    with pytest.raises(ValueError, match="≥ 5 steps, one a time, got 4"):
        fit(amounts[:4], [1.0] * 4)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON, or cut short"),
        ("[]", "must hold an object, got list"),
        ('{"format": "ila.layer_mask", "version": 1}', "missing fixed_ms, per_flop_ms"),
    ],
)
def test_another_file_is_no_file_of_speeds(tmp_path, text, why):
    file = tmp_path / "speed.json"
    with pytest.raises(ValueError, match="no such file of speeds"):
        Speed.load(file)
    file.write_text(text)
    with pytest.raises(ValueError, match=f"speed.json: {why}"):
        Speed.load(file)


def test_a_curve_starts_at_the_cheapest_and_ends_with_everything():
    found = spending("time=0.95", mask_of([float(i % 5 + 1) for i in range(len(NAMES))]))
    curves = found.curves(most=5)
    assert len(curves["frontier"]) == 5 and len(curves["plain"]) == len(NAMES)
    assert curves["frontier"][-1] == curves["plain"][-1] == [1.0, pytest.approx(1.0)]
    best = found.chosen()
    marks = [(best.cost / found.unit, 0.5, "selected", "#2f6db3")]
    (axes,) = pareto_figure(curves, TIME, marks, limit=(0.95, "budget")).axes
    assert axes.get_xlabel() == "Time of a training step (1 = all layers open)"
    assert "selected, 50%" in {text.get_text() for text in axes.texts}

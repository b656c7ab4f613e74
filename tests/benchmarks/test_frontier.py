"""The frontier: ways to train, each at its best rate, their total times, and the sentences."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.frontier import run as frontier
from benchmarks.frontier import train as training
from benchmarks.frontier.additive import by_kind_and_block
from benchmarks.frontier.methods import LAST_MLPS, METHODS, PARTS, RATES, SMALL, best_by
from benchmarks.frontier.times import CACHED, FILL, PEFT, SCAN, SCORE
from benchmarks.frontier.ways import ALL, FULL, NO_QK, ONE_PASS, Way
from benchmarks.sections import advice, best_rate
from benchmarks.sections import frontier as section
from benchmarks.sections.frontier_numbers import PATH_BATCHES, Frontier, gap, less_on, rival
from benchmarks.sections.student import p_value
from benchmarks.sections.study_numbers import Estimate
from benchmarks.sections.verdict import word, words

HALF = Way("one run", opened="blocks:1", at=0.25)
# Trainings that lose the same share of the gain everywhere.
EVEN = {
    0.0: {"a": [1.0, 1.2], "b": [1.5, 1.4]},
    0.1: {"a": [1.1, 1.28], "b": [1.55, 1.46]},
    0.2: {"a": [1.2, 1.36], "b": [1.6, 1.52]},
}
CUT = Way("cut", share=0.5)
TWICE = Way("two runs", opened="top:0.3", search=True)
KAPPA = Way("kappa", opened="kappa:0.3")
MS = {
    PEFT: [10.0], ALL: [8.0], SCORE: [3.0], f"{SCAN}, kappa": [30.0],
    "blocks:1, kept": [4.0], "top:0.3, from scratch": [6.0], "kappa:0.3, from scratch": [5.0],
}  # fmt: skip


def line(way, data, seed, rate, loss, part="one pass", **key):
    common = {"limit": 100, "held_out": 0.6, "full": 60, "model": "m", "rank": 8}
    common |= {"batch_rows": 2, "max_length": 9, "part": part, "data": data, "seed": seed}
    key = {**common, **way.key(), "learning_rate": rate, "steps": way.steps(60), **key}
    return {"kind": "frontier", "key": key, "result": {"before": 2.0, "held_out_loss": loss}}


def trained(way, losses, part="one pass"):
    """Two sets and two seeds; the best of three rates on seed 0 is 2e-3."""
    lines = []
    for data in losses:
        for seed, loss in enumerate(losses[data]):
            rates = {1e-3: 0.1, 2e-3: 0.0, 3e-3: 0.2} if seed == 0 else {2e-3: 0.0}
            lines += [line(way, data, seed, r, loss + more, part) for r, more in rates.items()]
    return lines


def times(part="one pass", data=("a", "b"), **ms):
    key = {"part": part}
    return [
        {"kind": "frontier times", "key": key | {"data": name}, "result": MS | ms} for name in data
    ]


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setitem(PARTS, "one pass", (FULL, HALF, CUT, TWICE, KAPPA))
    base = {"kind": "base", "key": {"limit": 100}, "result": {"rows": 40}}
    return [
        base,
        *trained(FULL, {"a": [1.0, 1.2], "b": [1.5, 1.4]}),
        *trained(HALF, {"a": [1.1, 1.2], "b": [1.6, 1.4]}),
        *trained(CUT, {"a": [1.2, 1.36], "b": [1.6, 1.52]}),
        *trained(TWICE, {"a": [1.0, 1.0]}),
        *trained(KAPPA, {"a": [1.0, 1.0]}),
        *times(),
    ]


def test_total_time_counts_steps_scores_and_scans(lines):
    points = {point.way: point for point in Frontier(lines).points("one pass")}
    steps, full = 60, 60 * 10.0
    expected = {
        FULL: steps * 8 / full,
        HALF: (15 * 8 + 45 * 4) / full,
        CUT: 30 * 8 / full,
        TWICE: (steps * 8 + PATH_BATCHES * 3 + steps * 6) / full,
        KAPPA: (30 + steps * 5) / full,
    }
    assert {way: point.time for way, point in points.items()} == pytest.approx(expected)


def test_the_cache_is_paid_for_in_the_part_that_uses_it(lines, monkeypatch):
    monkeypatch.setitem(PARTS, "epochs", (FULL, HALF))
    extra = {"blocks:1, kept" + CACHED: [2.0], f"{FILL}, blocks:1, kept": [1.5]}
    lines += trained(FULL, {"a": [1.0]}, "epochs") + trained(HALF, {"a": [1.0]}, "epochs")
    lines += times("epochs", ("a",), **extra)
    whole, half = Frontier(lines).points("epochs")
    assert whole.time == 0.8
    assert half.time == pytest.approx((15 * 8 + 40 * 1.5 + 45 * 2) / 600)


def test_each_way_is_at_the_rate_that_was_best_on_the_first_seed(lines):
    whole, half, *_ = Frontier(lines).points("one pass")
    assert half.rates == {"a": 2e-3, "b": 2e-3} and whole.estimate().mean == 0.0
    assert half.lost == pytest.approx({("a", 0): 0.1, ("a", 1): 0.0, ("b", 0): 0.2, ("b", 1): 0.0})
    # A better loss at another rate on a later seed counts for nothing.
    again = Frontier([*lines, line(HALF, "a", 1, 1e-3, 0.5)]).points("one pass")[1]
    assert again.lost == half.lost
    # Two rates are no search.
    few = [found for found in lines if found["key"].get("learning_rate") != 3e-3]
    assert Frontier(few).points("one pass") == []


def test_the_rival_is_the_cut_that_takes_as_long(lines):
    points = Frontier(lines).points("one pass")
    _, half, cut, *_ = points
    assert half.time > cut.time and rival(points, half).way == FULL
    assert rival(points, cut).way == CUT
    assert gap(half, cut).mean == pytest.approx((0.1 + 0.0 + 0.2 + 0.0) / 4 - 0.2)


def test_the_page_and_the_front_say_what_the_numbers_say(lines):
    text = "\n".join(section.markdown({"frontier": lines}))
    # Data set a loses 0.1 and 0.0 on its seeds, b 0.2 and 0.0: two replicates, 0.05 and 0.1.
    assert "| one run | 0.50 | 7.5 % (-24.3 … 39.3) | 5.0, 10.0 | 2, 2 | 4 |" in text
    assert "| PEFT, all layers | 1.00 | 0.0 % | 0.0, 0.0 |" in text
    assert "A full run reads 40 rows, 3×; data: a, b; 4 pairs" in text
    # The search takes 516 ms of PEFT's 600; a training saves 120 of them: 4.3 trainings.
    assert "| two runs, best 30 % | 0.86 | 0.60 | 1.46 | training 5 |" in text
    slow = [*lines[:-1], *times(data=("b",), **{"top:0.3, from scratch": [7.0]})]
    assert "| training 5 … 9 |" in "\n".join(section.markdown({"frontier": slow}))
    slow = [*lines[:-1], *times(data=("b",), **{"top:0.3, from scratch": [9.0]})]
    assert "| never on some data |" in "\n".join(section.markdown({"frontier": slow}))
    said = "The first loses 7.5 % more of the gain (difference -24.3 … +39.3): can't be told (less"
    assert said in text


def test_a_verdict_is_corrected_and_a_tie_is_near():
    far, near = Estimate.of([0.05, 0.06, 0.07]), Estimate.of([0.0, 0.001, -0.001])
    wide = Estimate.of([0.0, 0.1, 0.2])
    assert words([far, near, wide]) == ["worse", "a tie", "can't be told"]
    assert word(Estimate.of([-0.05, -0.06, -0.07])) == "better"
    some = Estimate.of([0.03, 0.06, 0.06])  # p = 0.038: enough alone, not among two
    assert some.p() == pytest.approx(p_value([0.03, 0.06, 0.06], 0.0))
    assert word(some) == "worse" and words([some, wide]) == ["can't be told"] * 2
    assert word(Estimate.of([0.5])) == "can't be told"


def test_the_advice_is_what_the_numbers_say(lines, monkeypatch):
    setting, sentences, shown = advice.summary({"frontier": lines})
    assert "data: a, b; 4 pairs" in setting and shown.endswith("(docs/figures/frontier.png)")
    assert "1. Begin with all layers: the losses of PEFT, in 0.80 of its time." in sentences
    # HALF loses 0.1, 0.0, 0.2, 0.0 of the gain; all layers were not trained in as much time.
    assert "*one run* takes 0.50 and loses 7.5 % (-24.3 … 39.3)." in sentences
    assert "Few layers" not in sentences and "three epochs" not in sentences

    path, chance = best_by("path", 0.3), best_by("random", 0.3)
    cut = Way("cut", share=0.65)  # takes 0.52
    monkeypatch.setitem(PARTS, "one pass", (FULL, HALF, cut, path, chance))
    more = trained(cut, {"a": [1.3, 1.44], "b": [1.65, 1.58]})  # loses 0.3 everywhere
    (text,) = [t for t in advice.advice(Frontier(lines + more)) if "within" in t]
    said = "; *cut* takes 0.52 and loses 30.0 %: can't be told (the run loses less on 2 of 2 data"
    assert said in text
    more = trained(path, EVEN[0.1]) + trained(chance, EVEN[0.2])
    (text,) = [t for t in advice.advice(Frontier(lines + more)) if "Few" in t]
    assert "Few layers from the start: 30 % at random lose 20.0 %" in text
    assert "the best 30 % by `path` (in 1.46, with its search) lose 10.0 %: better." in text
    noisy = trained(chance, {"a": [1.05, 1.32], "b": [1.6, 1.46]}) + trained(path, EVEN[0.1])
    (text,) = [t for t in advice.advice(Frontier(lines + noisy)) if "Few" in t]
    assert "at random lose 12.5 % (-19.3 … 44.3)." in text
    assert text.endswith("lose 10.0 %: can't be told. None was shown to beat chance.")
    # A tie is a difference that is small for certain.
    kappa = best_by("kappa", 0.3)
    monkeypatch.setitem(PARTS, "one pass", (FULL, path, chance, kappa))
    more += trained(kappa, {"a": [1.1005, 1.2796], "b": [1.55, 1.46]})
    (text,) = [t for t in advice.advice(Frontier(lines + more)) if "Few" in t]
    assert "`kappa` (in 0.55, from the weights alone) lose 10.0 %: better." in text
    assert text.endswith(" `kappa` against `path`: a tie.")
    assert advice.summary({}) == []


def test_the_small_base_stands_beside_its_own_number(lines, monkeypatch):
    monkeypatch.setitem(PARTS, "one pass", (FULL, NO_QK))
    small = [line | {"key": line["key"] | {"part": SMALL}} for line in trained(NO_QK, EVEN[0.2])]
    small += [line | {"key": line["key"] | {"part": SMALL}} for line in trained(FULL, EVEN[0.0])]
    small += [line | {"key": line["key"] | {"learning_rate": 4e-3}} for line in small[-3:]]
    found = {"frontier": [*lines, *trained(NO_QK, EVEN[0.1])], "small-base": small}
    monkeypatch.setitem(RATES, SMALL, (1e-3, 2e-3, 3e-3))
    sentences = advice.markdown(found)[1]
    assert "Leaving out every q and k loses 10.0 %: " in sentences
    assert "it loses 20.0 %, the mean of 2 data sets." in sentences


def test_data_sets_are_compared_seed_by_seed(lines):
    one = trained(HALF, {"a": [1.5, 1.1]})  # loses 0.5 and -0.125
    other = trained(CUT, {"a": [1.4]})  # was not trained on seed 1
    points = {
        p.way: p for p in Frontier([*trained(FULL, EVEN[0.0]), *one, *other]).points("one pass")
    }
    assert less_on(points[HALF], points[CUT]) == "0 of 1 data sets"
    assert gap(points[HALF], points[CUT]).mean == pytest.approx(0.1)


def test_trainings_that_ran_again_say_how_far_they_changed(lines):
    assert Frontier(lines).repeats() == []
    again = [line(FULL, "a", 0, 2e-3, 1.01), line(HALF, "a", 1, 2e-3, 1.18)]
    found = lines + [item | {"kind": "frontier again"} for item in again]
    assert Frontier(found).repeats() == pytest.approx([0.01, -0.025])
    text = "\n".join(section.markdown({"frontier": found}))
    assert "2 that ran on both differ by -2.5 … +1.0 % of the gain." in text


def test_a_way_opens_the_layers_that_its_name_says():
    names = [f"layers.{block}.{kind}" for block in range(4) for kind in ("q_proj", "up_proj")]
    scores = [1.0, 2.0, 8.0, 7.0, 3.0, 4.0, 5.0, 6.0]
    assert Way("", opened="blocks:1").mask(names).open == tuple(names[-2:])
    assert Way("", opened="top:0.25").mask(names, scores).open == tuple(names[2:4])
    assert Way("", opened="kappa:0.25").mask(names, scores).open == tuple(names[2:4])
    mlps = ["layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]
    assert Way("", opened="mlps:1").mask(mlps).open == (mlps[2],)
    assert Way("", opened="no-qk").mask(names[:2]).open == (names[1],)
    assert [way.by_weights for way in (KAPPA, TWICE, HALF)] == ["kappa", None, None]
    every = PARTS["one pass"]
    distinct = {(way.opened, way.at, way.share, way.search) for way in every}
    assert len(distinct) == len(every) == len({way.name for way in every})


def test_a_method_at_a_share_is_trained_once():
    assert best_by("path", 0.3) in ONE_PASS and best_by("kappa", 0.3) in ONE_PASS
    assert best_by("path", 0.1) in METHODS and best_by("path", 0.1).scored_by == "path"
    assert best_by("ila", 0.3).search and not best_by("others", 0.3).search


def test_the_scores_of_other_data_sets_are_averaged(monkeypatch):
    scores = {"a": [9.0, 9.0], "b": [1.0, 4.0], "c": [3.0, 2.0]}
    bench = SimpleNamespace(plan=SimpleNamespace(data=scores))
    trainings = training.Trainings(bench, "one pass", 4, None)
    monkeypatch.setattr(training.Trainings, "_scored", lambda self, data, seed, by: scores[data])
    assert trainings._scores("a", 0, best_by("others", 0.3)) == [2.0, 3.0]
    assert trainings._scores("a", 0, best_by("path", 0.3)) == [9.0, 9.0]
    assert trainings._scores("a", 0, HALF) is None
    names = ["layers.0.q_proj", "layers.0.v_proj"]
    layers = SimpleNamespace(layers=dict.fromkeys(names))
    monkeypatch.setattr(training, "AdapterUpdates", lambda model: layers)
    bench.fresh = lambda data, seed: None
    # One block: the kinds explain the places of 2.0 and 3.0 exactly.
    assert trainings._scores("a", 0, best_by("additive", 0.3)) == [1.0, 2.0]
    with pytest.raises(ValueError, match="every kind in every block, got 3 names"):
        by_kind_and_block([*names, "layers.1.q_proj"], [1.0, 2.0, 3.0])


def test_methods_are_compared_on_the_same_cells_and_stay_out_of_the_frontier(monkeypatch):
    path, update, mlps = best_by("path", 0.3), best_by("update_norm", 0.3), LAST_MLPS
    found = [
        *trained(FULL, {"a": [1.0, 1.2], "b": [1.5, 1.4]}),
        *trained(path, {"a": [1.1, 1.28]}),
        *trained(update, {"a": [1.2, 1.36], "b": [1.6, 1.4]}),
        *trained(mlps, {"b": [1.55, 1.46]}),
        {"kind": "base", "key": {"limit": 100}, "result": {"rows": 40}},
    ]
    text = "\n".join(best_rate.markdown({"frontier": found}))
    assert "**30% of the layers.**" in text and "**10%" not in text
    assert "| best 30 % by `update_norm` | 15.0 % (" in text
    row = next(
        line for line in text.splitlines() if line.startswith("| best 30 % by `update_norm`")
    )
    assert row.split(" | ")[3] == "+10.0 %, can't be told" and row.endswith("| 4 |")
    row = next(line for line in text.splitlines() if "MLPs of the last 21" in line and "|" in line)
    assert row.split(" | ")[3].strip() == ""  # no cell in common
    assert "update_norm" not in "\n".join(section.markdown({"frontier": found}))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "rows.json"], "NAME=FILE"),
        (["--part", "x"], "invalid choice"),
        (["--data", "a=b", "--way", "x"], "no q and k"),
    ],
)
def test_bad_options_are_named(options, says, capsys):
    with pytest.raises(SystemExit):
        frontier.parse(["--model", "m", "--out", "o", *options])
    assert says in capsys.readouterr().err


def test_every_way_trains_and_a_second_command_trains_nothing(
    tiny_model_folder, tmp_path, monkeypatch
):
    rows = [{"instruction": f"add {i}", "output": str(i % 7)} for i in range(600)]
    data, out = tmp_path / "rows.json", tmp_path / "found.jsonl"
    data.write_text(json.dumps(rows))
    ways = (FULL, HALF, Way("no q and k", opened="no-qk"), TWICE, KAPPA)
    monkeypatch.setitem(PARTS, "one pass", ways)
    path = training.Scoring("path", 1.0, stage2_steps=5)
    monkeypatch.setitem(training.SCORINGS, "path", path)
    command = ["frontier", "--model", str(tiny_model_folder), "--data", f"a={data}"]
    command += ["--out", str(out), "--part", "one pass", "--steps", "4", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", command)
    frontier.main()
    found = [json.loads(text) for text in out.read_text().splitlines()]
    cells = [item["key"] for item in found if item["kind"] == "frontier"]
    assert {(key["opened"], key["seed"]) for key in cells} == {
        (way.opened, seed) for way in ways for seed in (0, 1)
    }
    assert all(len([k for k in cells if k["opened"] == way.opened]) >= 4 for way in ways)
    whole = out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(training.Trainings, "_train", None)
        frontier.main()
    assert out.read_bytes() == whole
    assert len(Frontier(found).points("one pass")) == len(ways)
    # Once more: the best rate of the first seed, and on this machine the same loss.
    monkeypatch.setattr("sys.argv", [*command, "--way", FULL.name, "--again"])
    frontier.main()
    (again,) = [json.loads(text) for text in out.read_bytes()[len(whole) :].splitlines()]
    first = {json.dumps(item["key"]): item["result"] for item in found}[json.dumps(again["key"])]
    assert again["kind"] == "frontier again" and again["result"] == first
    assert Frontier([*found, again]).repeats() == [0.0]

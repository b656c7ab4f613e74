"""The study: cells that are done once, what agrees with what, and verdicts that follow a rule."""

import gc
import json
import math

import numpy as np
import pytest

from benchmarks.sections import study as section
from benchmarks.sections import study_lessons as lessons
from benchmarks.sections.student import holm, two_sided
from benchmarks.sections.study_claims import FAILS, HOLDS, OPEN, Claim, claims
from benchmarks.sections.study_numbers import Estimate, Study
from benchmarks.study import agreement
from benchmarks.study import run as study
from benchmarks.study.cells import ways, within
from benchmarks.study.records import Records
from ila.masks.mask import LayerMask

# ---- records


def test_a_torn_last_line_is_removed_and_its_cell_done_again(tmp_path):
    file = tmp_path / "a.jsonl"
    records = Records(file)
    records.add("mask", {"seed": 0}, {"scores": [1.0]})
    records.add("mask", {"seed": 1}, {"scores": [2.0]})
    records.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    again = Records(file)
    assert again.get("mask", {"seed": 0}) == {"scores": [1.0]}
    assert again.get("mask", {"seed": 1}) is None and again.get("train", {"seed": 0}) is None
    again.add("mask", {"seed": 1}, {"scores": [2.0]})
    again.close()
    assert file.read_bytes() == whole


def test_a_damaged_line_before_the_last_is_an_error(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"kind": "mask", "ke\n{"kind": "mask", "key": {}, "result": {}}\n')
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        Records(file)


def test_two_studies_do_not_write_one_file(tmp_path):
    records = Records(tmp_path / "a.jsonl")
    with pytest.raises(BlockingIOError):
        Records(tmp_path / "a.jsonl")
    records.close()
    Records(tmp_path / "a.jsonl").close()


# ---- agreement


def test_spearman_is_that_of_the_masks(seed):
    draw = np.random.default_rng(seed)
    a, b = draw.integers(6, size=(2, 40)).astype(float)  # with ties
    masks = [LayerMask({str(i): x for i, x in enumerate(values)}) for values in (a, b)]
    assert agreement.spearman(a, b) == pytest.approx(masks[0].spearman(masks[1]), rel=1e-12)


def test_the_interval_holds_what_other_batches_give(seed):
    # Parts of 60 scores, as noisy as they differ, twice of one ranking: how often the mean ρ of
    # many such experiments lies within the interval of one.
    draw, trials = np.random.default_rng(seed), 100
    truth = draw.normal(size=60)
    parts = truth + draw.normal(size=(trials, 2, 8, 60)) * 3
    rhos = [float(agreement.spearman(a.mean(0), b.mean(0))) for a, b in parts]
    expected, inside = sum(rhos) / trials, 0
    for (a, b), rho in zip(parts, rhos, strict=True):
        low, high = agreement.interval(a, b, draws=100)
        assert low < rho < high
        inside += low <= expected <= high
    # 95 of 100 with a standard deviation of 2.2; eight parts make it a little too narrow.
    assert 85 <= inside <= 100
    assert agreement.interval(a[:2], b) is None


def test_scores_that_are_all_equal_agree_with_nothing(seed):
    # An adapter after one step of warm-up is 0, and so is every score of it.
    folds = np.random.default_rng(seed).normal(size=(4, 5))
    none = {"scores": [0.0] * 5, "folds": [[0.0] * 5] * 4}
    some = {"scores": folds.mean(0).tolist(), "folds": folds.tolist()}
    for pair in ((none, some), (some, none), (none, none)):
        found = agreement.compare(*pair)
        assert found["spearman"] is None and found["interval"] is None
        assert found["jaccard"]["0.9"] > 0
    assert agreement.halves(none["folds"]) is None


def test_noise_does_not_repeat_between_halves_and_a_ranking_does(seed):
    draw = np.random.default_rng(seed)
    noise = draw.normal(size=(8, 400))
    assert abs(agreement.halves(noise)) < 4 / math.sqrt(400)
    assert agreement.halves(draw.normal(size=400) * 10 + noise) > 0.9


def test_masks_are_compared_if_they_differ_in_one_thing():
    same = {"model": "m", "milestone": 1.0}
    keys = [
        {**same, "data": "a", "seed": 0, "method": "path"},
        {**same, "data": "b", "seed": 0, "method": "path"},
        {**same, "data": "b", "seed": 1, "method": "path"},
        {**same, "data": "a", "seed": 0, "method": "ila", "score_init": 4.0},
        {**same, "data": "a", "seed": 0, "method": "ila", "score_init": 2.0},
        {"model": "m", "data": "a", "seed": 0, "method": "first"},
        {"model": "n", "data": "a", "seed": 0, "method": "first"},
    ]
    found = {(factor, i, j) for factor, i, j in agreement.pairs(keys)}
    assert found == {
        *(("data", 0, 1), ("seed", 1, 2), ("score_init", 3, 4)),
        *(("method", 0, 3), ("method", 0, 5), ("method", 3, 5)),
    }


def test_only_options_that_matter_make_new_cells():
    found = ways(["path", "ila", "first"], [1.0, 0.5], [60], [4.0, 1.0], [0.01])
    methods = [way.method for way in found]
    assert (methods.count("path"), methods.count("ila"), methods.count("first")) == (2, 4, 1)
    assert found[0].key() == {"method": "path", "milestone": 1.0, "stage2_steps": 60}
    weighed = ways(["snr", "snr_overall", "kappa"], [1.0, 0.5], [60, 30], [4.0, 1.0], [0.01])
    assert [way.key() for way in weighed] == [
        {"method": "snr"},
        {"method": "snr_overall"},
        {"method": "kappa"},
    ]


def test_a_cut_by_parameters_stays_within_its_share():
    mask = LayerMask({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0})
    sizes = {"a": 10, "b": 100, "c": 10, "d": 80}
    assert within(mask, sizes, 0.1) == {"a": True, "b": False, "c": True, "d": False}
    with pytest.raises(ValueError, match="room for one layer"):
        within(mask, sizes, 0.01)


# ---- verdicts


@pytest.mark.parametrize(
    ("values", "whole", "word"),
    [
        ([1.0, 1.1, 0.9], True, HOLDS),
        ([-1.0, -1.1, -0.9], True, FAILS),
        ([1.0, -1.0, 0.5], True, OPEN),
        ([1.0, 1.1, 0.9], False, OPEN),  # runs are missing
        ([1.0, 1.0], True, OPEN),  # too few, though they have no spread
    ],
)
def test_a_verdict_needs_enough_data_sets_that_agree(values, whole, word):
    claim = Claim("It is so", values, 0.0, above=True, whole=whole)
    told = holm([claim.p]) if claim.is_able else [False]
    assert claim.sentence(*told).endswith(f"**{word}**.")
    below = Claim("It is so", values, 0.0, above=False, whole=whole)
    mirrored = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}
    assert below.sentence(*told).endswith(f"**{mirrored[word]}**.")


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    # Two-sided points of tables of Student's t.
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (9.925, 2, 0.01), (2.228, 10, 0.05), (3.365, 5, 0.02)],
)
def test_p_values_are_those_of_the_tables(t, degrees, p):
    assert two_sided(t, degrees) == pytest.approx(p, abs=2e-4)


def test_holm_stops_at_the_first_that_is_not_rejected():
    assert holm([0.01, 0.04, 0.012]) == [True, True, True]
    assert holm([0.01, 0.04, 0.03]) == [True, False, False]
    assert holm([0.02, 0.001]) == [True, True]


def test_the_interval_is_students():
    said = Estimate.of([1.0, 2.0, 3.0, 4.0])
    half = 3.182 * math.sqrt(5 / 3) / 2
    assert (said.low, said.high) == pytest.approx((2.5 - half, 2.5 + half))


# ---- end to end, on a model of two blocks


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder):
    """A small study of two seeds, begun with one of them and the masks alone."""
    gc.freeze()  # each training collects garbage, over all modules imported
    folder = tmp_path_factory.mktemp("study")
    for name, shift in (("up", 1), ("down", 7)):
        rows = [
            {"instruction": f"{i} + {shift}", "input": "", "output": f"{(i + shift) % 10} . ="}
            for i in range(10)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    options = ["--model", str(tiny_model_folder), "--out", str(folder / "study-tiny.jsonl")]
    options += [f"--data={name}={folder / name}.json" for name in ("up", "down")]
    options += ["--methods", "path", "update_norm", "random", "--milestones", "1", "0.5"]
    options += ["--steps", "4", "--stage2-steps", "5", "--batch-size", "2", "--rank", "2"]
    options += ["--held-out", "0.2", "--fractions", "0.3", "--seeds", "0"]
    study.run(study.parse([*options, "--only", "masks"]))
    first = (folder / "study-tiny.jsonl").read_bytes()
    study.run(study.parse([*options, "1"]))
    text = (folder / "study-tiny.jsonl").read_bytes()
    assert text.startswith(first)
    study.run(study.parse([*options, "1"]))
    assert (folder / "study-tiny.jsonl").read_bytes() == text  # nothing was done twice
    gc.unfreeze()
    return [json.loads(line) for line in text.decode().splitlines()]


def of(lines, kind):
    return [line for line in lines if line["kind"] == kind]


def test_stage_1_runs_once_for_all_that_scores_it(finished):
    assert len(of(finished, "stage1")) == 2 * 2 and len(of(finished, "layers")) == 1
    masks = of(finished, "mask")
    # Two trained methods at two milestones, and random.
    assert len(masks) == 2 * 2 * (2 * 2 + 1)
    halfway = [m for m in masks if m["key"].get("milestone") == 0.5]
    assert {m["result"]["cost"]["stage1"]["steps"] for m in halfway} == {2}


def test_a_milestone_is_the_search_stopped_there(finished):
    by = {
        (m["key"].get("milestone"), m["key"]["method"]): m["result"]["scores"]
        for m in of(finished, "mask")
        if (m["key"]["data"], m["key"]["seed"]) == ("up", 0)
    }
    assert by[0.5, "update_norm"] != by[1.0, "update_norm"]
    # B begins at 0 and each step of Adam moves it: norms grow from step 2 to step 4.
    assert sum(by[0.5, "update_norm"]) < sum(by[1.0, "update_norm"])


def test_trainings_begin_alike_and_keep_what_they_say(finished):
    trained = of(finished, "train")
    assert len(trained) == 2 * 2 * (1 + 3 * 2)
    sizes = of(finished, "layers")[0]["result"]["parameters"]
    for line in trained:
        key, result = line["key"], line["result"]
        if key["method"] == "all layers":
            assert result["trainable_parameters"] == sum(sizes)
        elif key["cut"] == "parameters":
            assert result["trainable_parameters"] <= key["share"] * sum(sizes)
        else:
            assert result["open_modules"] == math.floor(key["share"] * len(sizes) + 0.5)
        assert math.isfinite(result["held_out_loss"])


def test_training_all_layers_is_stage_1_of_the_same_seed(finished):
    # Same data, adapter, order and steps: the shared beginning of what the study compares.
    whole = {
        (t["key"]["data"], t["key"]["seed"]): t["result"]["held_out_loss"]
        for t in of(finished, "train")
        if t["key"]["method"] == "all layers"
    }
    for line in of(finished, "stage1"):
        place = (line["key"]["data"], line["key"]["seed"])
        assert line["result"]["held_out_loss"] == whole[place]


def test_the_section_tells_all_of_it(finished, tmp_path):
    found = {"study-tiny": finished}
    text = "\n".join(section.markdown(found))
    assert section.markdown({}) == [] and section.figures({}) == {}
    for name, draw in section.figures(found).items():
        assert f"figures/{name}" in text
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    said = claims(Study(finished))
    assert sum("between data sets" in line for line in said) == 4  # three overlaps and the order
    assert said[-1] == f"Trainings: on 2 data sets, too few for a verdict: **{OPEN}**."


def test_the_lessons_are_the_numbers_of_the_study(finished):
    study = Study(finished)
    (best,) = [
        line for line in lessons.lessons(study) if "the best 30 %" in line and "alone" in line
    ]
    lost = Estimate.of(study.by_data(study.lost("path", "count", 0.3)))
    assert f"costs {lost.mean * 100:.1f} % ({lost.low * 100:.1f} … {lost.high * 100:.1f})" in best
    short = "\n".join(lessons.markdown({"study-tiny": finished}))
    assert all(f". {line}" in short for line in lessons.lessons(study))
    untrained = [line for line in finished if line["kind"] != "train"]
    assert lessons.markdown({"study-tiny": untrained}) == [] == lessons.markdown({})


def test_a_loss_is_compared_with_that_of_the_same_data_and_seed(finished):
    study_ = Study(finished)
    behind = study_.losing("path", "count", 0.3, against="random")
    by = {
        (t["key"]["method"], t["key"]["data"], t["key"]["seed"]): t["result"]["held_out_loss"]
        for t in of(finished, "train")
        if t["key"].get("cut") == "count" and t["key"]["share"] == 0.3
    }
    cells = [(data, seed) for seed in range(2) for data in ("up", "down")]
    assert behind == {(d, s): by["path", d, s] - by["random", d, s] for d, s in cells}


RANKS = """
import gc, sys
import torch
from benchmarks.study import run as study
torch.set_num_threads(1)
gc.freeze()
study.run(study.parse(sys.argv[1:]))
"""


def test_two_processes_write_the_study_of_one(run_ranks, tiny_model_folder, tmp_path):
    data = tmp_path / "up.json"  # 8 rows to train on: processes fill an uneven epoch up
    rows = [{"instruction": f"{i} + 1", "input": "", "output": f"{i + 1} ."} for i in range(10)]
    data.write_text(json.dumps(rows))
    options = ["--model", tiny_model_folder, f"--data=up={data}", "--methods", "path", "random"]
    options += ["--steps", "3", "--stage2-steps", "5", "--rank", "2", "--held-out", "0.2"]
    run_ranks(RANKS, *options, "--batch-size", 1, "--out", tmp_path / "two.jsonl")
    options = [*map(str, options), "--batch-size", "2", "--out", str(tmp_path / "one.jsonl")]
    study.run(study.parse(options))
    two, one = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert [line["key"] for line in two] == [line["key"] for line in one]
    for found, expected in zip(two, one, strict=True):
        for name in ("scores", "held_out_loss"):
            if name in expected["result"]:
                # fp32: the same sums, added in another order.
                assert found["result"][name] == pytest.approx(expected["result"][name], rel=1e-4)

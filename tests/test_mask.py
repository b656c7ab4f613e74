"""Laws of LayerMask: what top and bottom keep, what agreement means, and what a file may hold."""

import copy
import errno
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ila.masks.mask import LayerMask, chance_jaccard
from ila.masks.names import parse_module_name

unhurried = settings(deadline=None)  # a busy machine is no failure
# Few distinct scores make ties; the rest are any finite floats, subnormal and huge ones included.
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0]), FINITE)
MASKS = st.dictionaries(st.text(min_size=1), SCORES, min_size=1, max_size=20).map(LayerMask)
SHARES = st.floats(min_value=0, max_value=1, exclude_min=True)
A = LayerMask({"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.0}, provenance={"seed": 1, "data": ["x"]})


@unhurried
@given(MASKS, SHARES, SHARES)
def test_top_is_monotone_in_fraction(mask, p, q):
    low, high = sorted([p, q])
    assert set(mask.top(low).open) <= set(mask.top(high).open)


@unhurried
@given(MASKS, SHARES)
def test_top_keeps_no_score_below_a_closed_one(mask, p):
    kept = mask.top(p)
    if kept.closed:
        worst = min(kept.scores[name] for name in kept.open)
        assert worst >= max(kept.scores[name] for name in kept.closed)
    assert kept.scores == mask.scores and kept.provenance == mask.provenance


@unhurried
@given(MASKS, st.floats(min_value=0, max_value=1, exclude_max=True))
def test_bottom_is_the_end_of_the_same_ranking(mask, p):
    count = math.floor(Fraction(repr(p)) * len(mask) + Fraction(1, 2))
    if count == len(mask):
        with pytest.raises(ValueError, match="leave a module open"):
            mask.without_bottom(p)
    else:
        kept = mask.without_bottom(p)
        assert set(kept.closed) == set(mask.ranking[len(mask) - count :])


@pytest.mark.parametrize(
    ("modules", "fraction", "kept"),
    [
        (7, 1e-300, 1),  # never nothing
        (1, 0.5, 1),
        (10, 0.15, 2),  # half rounds up, not to even
        (10, 0.25, 3),
        (10, 0.149, 1),
        (100, 0.145, 15),  # 14.5 in decimal, 14.499999999999998 in floating point
        (224, 0.3, 67),
        (7, 1, 7),
        (7, np.float32(0.5), 4),
        (100, np.float32(0.145), 15),  # 0.14499999582767487 as a float64
    ],
)
def test_top_rounds_half_up(modules, fraction, kept):
    mask = LayerMask({str(i): i for i in range(modules)})
    assert len(mask.top(fraction).open) == kept


def test_ties_are_broken_by_name_not_by_order():
    names = ["c", "a", "d", "b"]
    for order in (names, names[::-1]):
        mask = LayerMask(dict.fromkeys(order, 1.0))
        assert set(mask.top(0.5).open) == {"a", "b"}
        assert set(mask.without_bottom(0.5).closed) == {"c", "d"}


def test_cutting_looks_at_scores_only():
    assert A.top(0.25).top(0.5).open == ("a", "c") == A.top(0.5).open
    assert A.top(0.25).without_bottom(0).closed == ()


@pytest.mark.parametrize("fraction", [0, -0.1, 1.0000001, math.nan, math.inf, 10**400])
def test_top_refuses_shares_outside_its_range(fraction):
    with pytest.raises(ValueError, match="fraction must"):
        A.top(fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1, math.nan, 0.9])
def test_without_bottom_refuses_to_close_everything(fraction):
    with pytest.raises(ValueError, match="fraction must"):
        A.without_bottom(fraction)


@pytest.mark.parametrize("fraction", [None, "0.5", True, 1j])
def test_a_fraction_is_a_number(fraction):
    for call in (A.top, A.without_bottom, chance_jaccard):
        with pytest.raises(TypeError, match="must be a number"):
            call(fraction)


@unhurried
@given(MASKS, st.data())
def test_spearman_agrees_with_scipy(mask, data):
    stats = pytest.importorskip("scipy.stats")
    other = LayerMask({name: data.draw(SCORES) for name in reversed(list(mask.scores))})
    rho = mask.spearman(other)
    pairs = [(mask.scores[name], other.scores[name]) for name in mask.scores]
    if any(len({pair[i] for pair in pairs}) == 1 for i in (0, 1)):
        assert math.isnan(rho)  # also for one module
    else:
        ranks = [stats.rankdata(column) for column in zip(*pairs, strict=True)]
        assert rho == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
        assert rho == pytest.approx(stats.spearmanr(*ranks).statistic, abs=1e-12)


@unhurried
@given(MASKS)
def test_a_mask_agrees_with_itself(mask):
    assert mask.jaccard(mask) == 1
    rho = mask.spearman(mask)
    assert rho == 1 or math.isnan(rho)
    assert mask == copy.deepcopy(mask) and hash(mask) == hash(copy.deepcopy(mask))


@unhurried
@given(MASKS, st.data(), SHARES, SHARES)
def test_jaccard_is_symmetric_and_bounded(mask, data, p, q):
    other = LayerMask({name: data.draw(SCORES) for name in mask.scores}).top(q)
    index = mask.top(p).jaccard(other)
    assert 0 <= index <= 1 and index == other.jaccard(mask.top(p))


def test_jaccard_of_random_choices_is_the_chance_level():
    generator, p, found = np.random.default_rng(0), 0.3, []
    for _ in range(40):
        one, two = (
            LayerMask({str(i): v for i, v in enumerate(generator.random(2000))}) for _ in "ab"
        )
        found.append(one.top(p).jaccard(two.top(p)))
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - chance_jaccard(p)) < 5 * error
    assert (chance_jaccard(0), chance_jaccard(0.75), chance_jaccard(1)) == (0, 0.6, 1)


def test_masks_of_different_modules_cannot_be_compared():
    other = LayerMask({"a": 1, "b": 1, "z": 1})
    for call in (A.jaccard, A.spearman):
        with pytest.raises(ValueError, match=r"same 4 .* got 3: 2 missing .*'c'.* 1 unknown .*'z'"):
            call(other)
        with pytest.raises(TypeError, match="other must be a LayerMask, got dict"):
            call(dict(A.scores))


@unhurried
@given(MASKS)
def test_spread_is_ordered_and_finite(mask):
    spread = mask.spread()
    assert all(map(math.isfinite, spread.values()))
    assert spread["min"] <= spread["mean"] <= spread["max"] and spread["std"] >= 0
    assert (spread["std"] == 0) or spread["min"] < spread["max"]


def test_spread_of_known_numbers():
    assert A.spread() == {"min": 0, "max": 3, "mean": 1.5, "std": pytest.approx(math.sqrt(1.25))}


def test_nothing_can_be_changed():
    source = {"a": 1.0}
    mask = LayerMask(source, {"a": True}, {"config": {"steps": [1]}})
    source["a"] = 2.0
    assert mask.scores["a"] == 1.0
    with pytest.raises(FrozenInstanceError):
        mask.scores = {}
    for mapping in (mask.scores, mask.gates, mask.provenance, mask.provenance["config"]):
        with pytest.raises(TypeError):
            mapping["a"] = 0
    assert mask.provenance["config"]["steps"] == (1,)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_equal(clone):
    mask = A.top(0.5)
    assert clone(mask) == mask and clone(mask).open == ("a", "c") and clone(mask) != A


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "scores must name at least one", [{}]),
        (TypeError, "scores must be a mapping", [[("a", 1)]]),
        (TypeError, "module names as keys, got 1", [{1: 1.0}]),
        (ValueError, r"scores\['b'\] must be finite, got nan", [{"a": 1, "b": math.nan}]),
        (ValueError, r"scores\['b'\] must be finite, got -inf", [{"a": 1, "b": -math.inf}]),
        (ValueError, r"scores\['b'\] must be finite", [{"a": 1, "b": 10**400}]),
        (TypeError, r"scores\['a'\] must be a number, got bool", [{"a": True}]),
        (TypeError, r"scores\['a'\] must be a number, got str", [{"a": "1"}]),
        (TypeError, r"scores\['a'\] must be a number, got NoneType", [{"a": None}]),
        (TypeError, "gates must be a mapping", [{"a": 1}, [True]]),
        (ValueError, r"1 missing \(such as 'b'\)", [{"a": 1, "b": 1}, {"a": True}]),
        (ValueError, r"1 unknown \(such as 'b'\)", [{"a": 1}, {"a": True, "b": True}]),
        (TypeError, r"gates\['a'\] must be True or False, got 1", [{"a": 1}, {"a": 1}]),
        (ValueError, "all 1 are closed", [{"a": 1}, {"a": False}]),
        (TypeError, "provenance must be a mapping", [{"a": 1}, None, [1]]),
        (TypeError, r"provenance\['x'\]\[0\] must be .* got set", [{"a": 1}, None, {"x": [{1}]}]),
        (TypeError, r"provenance\['x'\] must have strings", [{"a": 1}, None, {"x": {1: 1}}]),
        (ValueError, r"provenance\['x'\] must be finite", [{"a": 1}, None, {"x": math.inf}]),
    ],
)
def test_bad_arguments_are_named(error, match, arguments):
    with pytest.raises(error, match=match):
        LayerMask(*arguments)


def test_numpy_scalars_are_numbers():
    mask = LayerMask({"a": np.float32(0.5), "b": np.int64(2)}, {"a": np.True_, "b": np.False_})
    assert mask.scores == {"a": 0.5, "b": 2.0} and type(mask.scores["b"]) is float
    assert mask.gates == {"a": True, "b": False} and type(mask.gates["b"]) is bool


LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text() | FINITE
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@unhurried
@given(MASKS, SHARES, st.dictionaries(st.text(), JSON, max_size=3))
def test_round_trip_is_exact(tmp_path_factory, mask, p, provenance):
    mask = LayerMask(mask.scores, mask.top(p).gates, provenance)
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    mask.save(path)
    loaded = LayerMask.load(path)
    assert loaded == mask and list(loaded.scores) == list(mask.scores)
    assert [v.hex() for v in loaded.scores.values()] == [v.hex() for v in mask.scores.values()]


def test_a_folder_means_its_mask_json(tmp_path):
    A.save(tmp_path)
    assert os.listdir(tmp_path) == ["mask.json"]
    assert LayerMask.load(tmp_path) == LayerMask.load(str(tmp_path / "mask.json")) == A


def test_the_file_is_what_the_documentation_says(tmp_path):
    LayerMask({"a": 0.5, "b": 1}, {"a": False, "b": True}, {"seed": 3}).save(tmp_path / "m")
    assert json.loads((tmp_path / "m").read_text()) == {
        "format": "ila.layer_mask",
        "version": 1,
        "modules": {"a": {"score": 0.5, "open": False}, "b": {"score": 1.0, "open": True}},
        "provenance": {"seed": 3},
    }


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_crash_in_the_middle_of_save_keeps_the_old_file(tmp_path, monkeypatch, call):
    A.save(tmp_path)

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match="No space left"):
        A.top(0.5).save(tmp_path)
    assert os.listdir(tmp_path) == ["mask.json"]
    assert LayerMask.load(tmp_path) == A


def test_every_truncation_is_refused(tmp_path):
    A.save(tmp_path)
    file = tmp_path / "mask.json"
    whole = file.read_bytes()
    for length in range(len(whole.rstrip())):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"mask\.json: not JSON, or cut short"):
            LayerMask.load(file)


GOOD = (
    '{"format":"ila.layer_mask","version":1,"modules":{"a":{"score":1,"open":true}},'
    '"provenance":{}}'
)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (GOOD, "hello", "not JSON"),
        (GOOD, "[1]", 'expected an object with "format"'),
        (GOOD, "[" * 100_000, "mask"),  # deeper than any parser's stack
        ("ila.layer_mask", "other", 'expected an object with "format"'),
        ('"version":1', '"version":2', "expected version 1, got 2"),
        ('"version":1', '"version":true', "expected version 1, got True"),
        ('"version":1,', "", "expected version 1, got None"),
        (',"provenance":{}', "", "the file must be an object with the fields .*'provenance'"),
        ('"provenance":{}', '"provenance":[]', "provenance must be a mapping, got list"),
        ('"provenance":{}', '"provenance":{"x":NaN}', "NaN is not a JSON number"),
        ('"score":1', '"score":NaN', "NaN is not a JSON number"),
        ('"score":1', '"score":-Infinity', "-Infinity is not a JSON number"),
        ('"score":1', '"score":1e999', r"scores\['a'\] must be finite"),
        ('"score":1', '"score":"1"', r"scores\['a'\] must be a number, got str"),
        ('"score":1', '"score":true', r"scores\['a'\] must be a number, got bool"),
        ('"score":1,', "", r"modules\['a'\] must be .*'score'.* got \['open'\]"),
        ('"open":true', '"open":1', r"gates\['a'\] must be True or False, got 1"),
        ('"open":true', '"open":false', "all 1 are closed"),
        ('"open":true', '"open":true,"open":false', "'open' appears twice"),
        ('"a":{', '"a":{"score":2,"open":true},"a":{', "'a' appears twice"),
        ('{"score":1,"open":true}', "1", r"modules\['a'\] must be an object .* got int"),
        ('{"a":{"score":1,"open":true}}', "{}", "at least one module"),
        ('{"a":{"score":1,"open":true}}', "[]", "modules must be an object, got list"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, old, new, match):
    file = tmp_path / "mine.mask"
    file.write_text(GOOD)
    assert len(LayerMask.load(file)) == 1
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=match) as caught:
        LayerMask.load(file)
    assert str(file) in str(caught.value)


def test_missing_and_binary_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json: no such mask file"):
        LayerMask.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"mask\.json: no such mask file"):
        LayerMask.load(tmp_path)
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=r"b: not a valid mask"):
        LayerMask.load(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("base_model.model.model.layers.12.self_attn.q_proj", (12, "q_proj")),
        ("layers.0.mlp.down_proj", (0, "down_proj")),
        ("h.3.c_attn", (3, "c_attn")),
        ("layers.3.mlp.experts.5.w1", (3, "w1")),  # the block, not the expert
        ("layers2.q_proj", None),
        ("layers.-1.q_proj", None),
        ("layers.01.q_proj", None),
        ("layers.٣.q_proj", None),  # a digit, but not one that Module names use
        ("layers.12", None),
        ("lm_head", None),
        ("", None),
    ],
)
def test_module_names_are_parsed(name, parsed):
    assert parse_module_name(name) == parsed


def test_masks_need_neither_torch_nor_matplotlib():
    code = (
        "import sys, ila.masks.mask, ila.runs.atomic\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)

"""Scores of a search that shares no row, order or adapter with the training that uses them."""

import json
import re

import pytest

from benchmarks.frontier.methods import METHODS, OTHER_ROWS, SMALL_BASE
from benchmarks.frontier.other_rows import apart, further_rows
from benchmarks.frontier.train import PATH, SCORINGS
from benchmarks.sections import best_rate
from benchmarks.study.cells import Bench, Plan
from ila.data.rows import load_rows
from tests.benchmarks.test_frontier import FULL, trained


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": f"say {n}", "output": str(n)}) for n in range(8)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_the_further_rows_begin_where_a_plan_stops_reading(rows):
    assert [row["output"] for row in further_rows(rows, 3)] == ["3", "4", "5"]
    with pytest.raises(ValueError, match="expected 10 rows, got 8"):
        further_rows(rows, 5)


def test_the_search_reads_other_rows_with_another_seed(rows, tmp_path, monkeypatch):
    plan = Plan("m", {"a": str(rows)}, tmp_path / "work", 2, 2, 1e-3, 4, 0.5, 9, 1, 2, "auto")
    asked = []

    def mask(bench, data, seed, way, milestones):
        asked.append((data, seed, way))
        read = bench.plan.inputs(data, seed).data
        asked.append([row["output"] for row in load_rows(read)])
        return {"scores": [1.0, 2.0]}

    monkeypatch.setattr(Bench, "mask", mask)
    assert apart(Bench(plan, None, tmp_path), "a", 1, SCORINGS[PATH]) == [1.0, 2.0]
    assert asked == [("a, other rows", 101, SCORINGS[PATH]), ["4", "5", "6", "7"]]


def test_it_is_a_way_of_the_comparison_and_not_of_what_was_fixed_beforehand():
    assert OTHER_ROWS in METHODS and OTHER_ROWS not in SMALL_BASE
    assert OTHER_ROWS.search and OTHER_ROWS.scored_by == "other-rows"


def test_the_page_says_how_far_the_masks_agree():
    def mask(data, seed, scores):
        key = {"data": data, "seed": seed, "method": "path"}
        return {"kind": "mask", "key": key, "result": {"scores": scores}}

    found = [
        *trained(FULL, {"a": [1.0, 1.2]}),
        *trained(OTHER_ROWS, {"a": [1.1, 1.28]}),
        mask("a", 0, [3.0, 2.0, 1.0]),
        mask("a", 1, [3.0, 2.0, 1.0]),
        mask("a, other rows", 100, [3.0, 2.0, 1.0]),
        mask("a, other rows", 101, [2.0, 3.0, 1.0]),
        {"kind": "base", "key": {"limit": 100}, "result": {"rows": 40}},
    ]
    text = "\n".join(best_rate.markdown({"frontier": found}))
    said = re.findall(r"ρ = ([\d.]+) and an overlap of the best 30 % of ([\d.]+)", text)
    assert said == [("0.75", "0.50"), ("1.00", "1.00")]
    assert "| best 30 % by `other-rows` | 10.0 % | 10.0 |" in text
    assert "two seeds of one set" not in "\n".join(best_rate.markdown({"frontier": found[:-3]}))

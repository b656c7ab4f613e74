"""Importance kept against the gain lost: at one rate, and at the best rates of the frontier."""

import pytest

from benchmarks.frontier.methods import best_by
from benchmarks.frontier.ways import FULL
from benchmarks.sections import study_importance as section
from benchmarks.sections.frontier_numbers import Frontier
from tests.benchmarks.test_frontier import trained

NAMES = [f"model.layers.{block}.mlp.{kind}_proj" for block in range(5) for kind in ("up", "down")]


def mask(method, scores):
    key = {"data": "a", "seed": 0, "method": method, "learning_rate": 1e-3}
    return {"kind": "mask", "key": key, "result": {"scores": scores}}


@pytest.fixture
def lines():
    """Ten layers whose importance is 0 to 9; `path` opens the last three, `kappa` the first."""
    scores = [float(n) for n in range(10)]
    return [
        {"kind": "layers", "key": {}, "result": {"names": NAMES}},
        *trained(FULL, {"a": [1.0, 1.0]}),
        *trained(best_by("path", 0.3), {"a": [1.1, 1.2]}),
        *trained(best_by("kappa", 0.3), {"a": [1.2, 1.2]}),
        *trained(best_by("random", 0.3), {"a": [1.3, 1.2]}),
        mask("path", scores),
        mask("kappa", scores[::-1]),
        mask("random", [5.0, 5.0, 0.0, 5.0] + [0.0] * 6),
    ]


def test_a_training_at_its_best_rate_keeps_what_its_layers_hold(lines):
    rows = section.at_best_rates(Frontier(lines))
    # Seed 1 has no scores, so it is left out.
    assert [(row.method, row.opened) for row in rows] == [
        ("`path`", 3),
        ("`kappa`", 3),
        ("`random`", 3),
    ]
    assert [row.plain for row in rows] == pytest.approx([24 / 45, 3 / 45, 4 / 45])
    assert [row.lost for row in rows] == pytest.approx([0.1, 0.2, 0.3])


def test_the_page_says_what_each_way_keeps_and_loses(lines):
    (text,) = section._at_best_rates(Frontier(lines))
    assert "over 3 trainings with 30 % of the layers" in text
    kept = "`path` 0.53 and 10.0 %; `kappa` 0.07 and 20.0 %; `random` 0.09 and 30.0 %."
    assert text.endswith(kept)
    # Kept: 0.53, 0.07, 0.09 against lost 0.1, 0.2, 0.3: ranks 3, 1, 2 and 1, 2, 3.
    assert "At best rates ρ is 0.50 and 0.50" in text
    assert section._at_best_rates(None) == [] == section._at_best_rates(Frontier(lines[:6]))

"""What the page says of the small base: sentences stated before, their numbers, their verdicts."""

import pytest

from benchmarks.frontier.methods import SMALL, SMALL_BASE, best_by
from benchmarks.frontier.ways import FULL, NO_QK
from benchmarks.sections import small_base as section
from benchmarks.sections.frontier_numbers import Frontier

CELLS = [(data, seed) for data in ("a", "b") for seed in (0, 1, 2)]
RATES = (1e-3, 2e-3, 3e-3, 5e-3)
NAMES = [f"layers.{block}.{kind}" for block in range(2) for kind in ("q_proj", "v_proj")]


def trained(way, lost, cells=CELLS, rates=RATES):
    """Losses between 2 before and 1 after all layers: a share of the gain is lost, with noise."""
    lines = []
    for number, (data, seed) in enumerate(cells):
        common = {"model": "m", "limit": 600, "held_out": 0.2, "part": SMALL}
        key = {**common, "data": data, "seed": seed, **way.key(), "full": 60}
        loss = 1.0 + lost + (0.001 * (number % 3 - 1) if lost else 0.0)
        for rate in rates if seed == 0 else (2e-3,):
            more = 0.0 if rate == 2e-3 else 0.1
            result = {"before": 2.0, "held_out_loss": loss + more}
            lines.append(
                {"kind": "frontier", "key": {**key, "learning_rate": rate}, "result": result}
            )
    return lines


@pytest.fixture
def lines():
    masks = [[1.0, 4.0, 2.0, 3.0], [3.0, 4.0, 1.0, 2.0]]  # 2 and 1 of the worst two are q
    keys = [{"method": "path", "data": "a", "seed": seed} for seed in (0, 1, 1)]  # one comes twice
    scored = zip(keys, [*masks, masks[1]], strict=True)
    return [
        {"kind": "layers", "key": {}, "result": {"names": NAMES, "parameters": [1] * 4}},
        *({"kind": "mask", "key": key, "result": {"scores": scores}} for key, scores in scored),
        *trained(FULL, 0.0),
        *trained(NO_QK, 0.05),
        *trained(best_by("path", 0.3), 0.03),
        *trained(best_by("random", 0.3), 0.08),
        *trained(best_by("kappa", 0.3), 0.08, CELLS[:3]),
    ]


def test_stated_sentences_get_their_verdicts(lines):
    text = "\n".join(section.markdown({section.FILE: lines}))
    said = "- Leaving out every q and k loses less than 2 %: 5.0 % more of the gain lost than with "
    assert said + "all layers (difference +4.9 … +5.1): **fails**." in text
    said = (
        "- `path` at 30 % beats random layers: 5.0 % less of the gain lost than with random layers"
    )
    assert said + " (difference -5.0 … -5.0): **holds**." in text
    kappa = next(line for line in text.splitlines() if "- `kappa` at 30 %" in line)
    assert kappa.endswith("runs are missing: **can't be told here**.")
    assert "- `path` at 10 % beats random layers: not measured." in text
    assert "Data: *a* and *b*, 6 pairs" in text and "| best 30 % by `path` | 3.0 % (" in text


def test_the_worst_layers_are_counted(lines):
    text = "\n".join(section.markdown({section.FILE: lines}))
    assert "Of the 2 layers with the lowest `path` scores, 1.5 are q or k (1 … 2 over 2" in text
    assert "random layers would have 1.0." in text
    assert section.markdown({}) == []
    few = [line for line in lines if line["kind"] != "layers"]
    assert "lowest `path` scores" not in "\n".join(section.markdown({section.FILE: few}))


def points_of(lines):
    return {point.way.name: point for point in Frontier(lines).points(SMALL)}


def verdict_of(lines, start):
    text = "\n".join(section.markdown({section.FILE: lines}))
    (line,) = [line for line in text.splitlines() if line.startswith(f"- {start}")]
    return line.rpartition("**")[0].rpartition("**")[2]


def test_a_best_rate_at_the_edge_of_those_tried_is_no_best_rate():
    path, chance = best_by("path", 0.1), best_by("random", 0.1)
    whole, start = [*trained(FULL, 0.0), *trained(chance, 0.08)], "`path` at 10 %"
    assert verdict_of([*whole, *trained(path, 0.03)], start) == "holds"
    edge = trained(path, 0.03, rates=(2e-3, 3e-3, 5e-3, 8e-3))
    assert verdict_of([*whole, *edge], start) == "can't be told here"
    few = trained(path, 0.03, rates=RATES[:3])  # fewer rates than the search begins with
    text = "\n".join(section.markdown({section.FILE: [*whole, *few]}))
    assert "- `path` at 10 % beats random layers: not measured." in text
    tables = "\n".join(section.markdown({section.FILE: [*whole, *edge]}))
    assert "| 2*, 2* | 6 |" in tables and "| 2, 2 | 6 |" in tables


def test_the_correction_is_for_the_whole_list():
    """A p-value below 5 % alone is no verdict among eleven sentences."""
    noisy = [0.08 + change for change in (0.02, -0.05, 0.06, 0.01, 0.05, 0.04)]
    lines = trained(FULL, 0.0)
    for cell, lost in zip(CELLS, noisy, strict=True):
        lines += trained(best_by("random", 0.3), lost, [cell]) + trained(
            best_by("path", 0.3), 0.05, [cell]
        )
    (claim,) = [
        section._claim(points_of(lines), *stated)
        for stated in section.STATED
        if stated[0] == "`path` at 30 % beats random layers"
    ]
    assert claim.whole and 0.05 / len(section.STATED) < claim.p < 0.05
    assert verdict_of(lines, "`path` at 30 % beats random") == "can't be told here"


def test_every_way_of_a_sentence_is_trained():
    assert len({tuple(way.key().items()) for way in SMALL_BASE}) == len(SMALL_BASE)
    for _, way, other, _ in section.STATED:
        assert way in SMALL_BASE and other in SMALL_BASE

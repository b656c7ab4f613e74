"""What the page says of the small base: sentences stated before, their numbers, their verdicts."""

import pytest

from benchmarks.frontier.methods import PARTS, SHARES, SMALL, SMALL_BASE, SMALL_MLPS, best_by
from benchmarks.frontier.ways import FULL, NO_QK
from benchmarks.sections import small_base as section

CELLS = [(data, seed) for data in ("a", "b") for seed in (0, 1, 2)]
NAMES = [f"layers.{block}.{kind}" for block in range(2) for kind in ("q_proj", "v_proj")]


def trained(way, lost, cells=CELLS):
    """Losses between 2 before and 1 after all layers: a share of the gain is lost, with noise."""
    lines = []
    for number, (data, seed) in enumerate(cells):
        common = {"model": "m", "limit": 600, "held_out": 0.2, "part": SMALL}
        key = {**common, "data": data, "seed": seed, **way.key(), "full": 60}
        loss = 1.0 + lost + (0.001 * (number % 3 - 1) if lost else 0.0)
        for rate in (1e-3, 2e-3, 3e-3) if seed == 0 else (2e-3,):
            more = 0.0 if rate == 2e-3 else 0.1
            result = {"before": 2.0, "held_out_loss": loss + more}
            lines.append(
                {"kind": "frontier", "key": {**key, "learning_rate": rate}, "result": result}
            )
    return lines


@pytest.fixture
def lines():
    masks = [[1.0, 4.0, 2.0, 3.0], [3.0, 4.0, 1.0, 2.0]]  # 2 and 1 of the worst two are q
    return [
        {"kind": "layers", "key": {}, "result": {"names": NAMES, "parameters": [1] * 4}},
        *({"kind": "mask", "key": {"method": "path"}, "result": {"scores": s}} for s in masks),
        *trained(FULL, 0.0),
        *trained(NO_QK, 0.05),
        *trained(best_by("path", 0.3), 0.03),
        *trained(best_by("random", 0.3), 0.08),
        *trained(best_by("kappa", 0.3), 0.08, CELLS[:3]),
    ]


def test_stated_sentences_get_their_verdicts(lines):
    text = "\n".join(section.markdown({section.FILE: lines}))
    assert "q and k loses less than 2 %: +5.0 % (+4.9 … +5.1): **fails**." in text
    assert "- `path` at 30 % beats chance: -5.0 % (-5.0 … -5.0) against it: **holds**." in text
    assert "`kappa` at 30 % beats chance: +0.0 %" in text
    kappa = next(line for line in text.splitlines() if "- `kappa` at 30 %" in line)
    assert kappa.endswith("runs are missing: **can't be told here**.")
    assert "- `path` at 10 % beats chance: not measured." in text
    assert "Data: a, b; 6 pairs" in text and "| best 30 % by `path` | +3.0 % (" in text


def test_the_worst_layers_are_counted(lines):
    text = "\n".join(section.markdown({section.FILE: lines}))
    assert "Of the 2 layers with the lowest `path` scores, 1.5 are q or k (1 … 2 over 2" in text
    assert "chance would give 1.0." in text
    assert section.markdown({}) == []


def test_every_way_of_a_sentence_is_trained():
    assert PARTS[SMALL] == SMALL_BASE
    assert len({tuple(way.key().items()) for way in SMALL_BASE}) == len(SMALL_BASE)
    for _, way, other, _ in section.STATED:
        assert way in SMALL_BASE and other in SMALL_BASE
    assert SMALL_MLPS in SMALL_BASE
    for share in SHARES:
        for method in ("path", "gate_gradient", "update_norm", "ila", "kappa", "snr", "random"):
            assert best_by(method, share) in SMALL_BASE

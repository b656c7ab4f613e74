"""What a set of layers is worth: sums over layers, and over blocks with diminishing returns."""

import itertools
import random

import pytest

from ila.masks.mask import LayerMask
from ila.masks.objective import BLOCKS, LAYERS, POWER, worth
from ila.price.choice import Choice


def drawn(seed: int, blocks: int = 3, kinds: int = 3) -> dict[str, float]:
    draw = random.Random(seed)
    names = (f"layers.{b}.{k}" for b in range(blocks) for k in "abc"[:kinds])
    return {name: draw.expovariate(1.0) ** 2 for name in names}


def worth_of(scores: dict[str, float], opened: tuple[str, ...]) -> float:
    """Sum over blocks of roots, written down directly."""
    blocks = {name.split(".")[1] for name in scores}
    sums = [sum(scores[n] for n in opened if n.split(".")[1] == b) for b in blocks]
    return sum(value**POWER for value in sums)


@pytest.mark.parametrize("seed", range(12))
def test_the_best_gains_are_the_best_set_of_every_size(seed):
    scores = drawn(seed)
    for count in range(1, len(scores) + 1):
        chosen = worth(LayerMask(scores), BLOCKS).top(count / len(scores)).open
        best = max(worth_of(scores, some) for some in itertools.combinations(scores, count))
        assert len(chosen) == count
        assert worth_of(scores, chosen) == pytest.approx(best, rel=1e-12)


def test_gains_sum_up_to_the_worth_of_all():
    scores = drawn(0)
    gains = worth(LayerMask(scores), BLOCKS).scores
    assert sum(gains.values()) == pytest.approx(worth_of(scores, tuple(scores)), rel=1e-12)


def test_layers_is_the_plain_order():
    scores = drawn(1)
    assert dict(worth(LayerMask(scores), LAYERS).scores) == scores


def test_scores_below_zero_open_last():
    scores = {"layers.0.a": -1.0, "layers.0.b": 1.0, "layers.1.a": -0.5, "layers.1.b": 0.1}
    ranking = worth(LayerMask(scores), BLOCKS).ranking
    assert ranking[2:] == ("layers.1.a", "layers.0.a")


def test_modules_outside_of_blocks_stand_alone():
    scores = {"lm_head": 1.0, "embed": 1.0, "layers.0.a": 1.0, "layers.0.b": 1.0}
    gains = worth(LayerMask(scores), BLOCKS).scores
    assert gains["lm_head"] == gains["embed"] == 1.0
    assert gains["layers.0.b"] == pytest.approx(2**POWER - 1)


def test_a_choice_keeps_the_scores_and_names_its_objective():
    scores = drawn(2)
    choice = Choice(top=0.34, objective=BLOCKS)
    mask = choice.cut(scores)
    assert dict(mask.scores) == scores
    assert mask.open == worth(LayerMask(scores), BLOCKS).top(0.34).open
    assert choice.as_dict() == {"top": 0.34, "objective": "blocks"}
    assert Choice(top=0.34).as_dict() == {"top": 0.34}  # as older versions wrote it


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"objective must be one of .*got 'rows'"):
        Choice(top=0.3, objective="rows")
    with pytest.raises(ValueError, match="objective does nothing with blocks"):
        Choice(blocks=2, objective=BLOCKS)

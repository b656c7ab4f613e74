"""Near copies are found, all of them, and never divided between training and held-out rows."""

import json
import random
from itertools import combinations

import pytest

from ila.commands.inputs import Inputs, prepare
from ila.data.near_copies import near_copies, split_groups
from ila.data.rows import split_indices


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def by_hand(texts: list[str]) -> list[int]:
    """Compare every pair, and join groups until nothing changes."""
    groups = list(range(len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        one, other = trigrams(texts[i]), trigrams(texts[j])
        if len(one & other) >= 0.5 * len(one | other):
            low, high = sorted((groups[i], groups[j]))
            groups = [low if group == high else group for group in groups]
    return groups


@pytest.mark.parametrize("seed", range(20))
def test_no_pair_is_missed_and_none_is_made_up(seed):
    draw = random.Random(seed)
    texts = []
    for _ in range(60):
        if texts and draw.random() < 0.6:  # a copy with a few other words
            words = draw.choice(texts).split()
            for _ in range(draw.randrange(4)):
                words[draw.randrange(len(words))] = draw.choice("pqrst")
        else:
            words = [draw.choice("abcdefgh") for _ in range(draw.randrange(1, 15))]
        texts.append(" ".join(words))
    found = near_copies([{"text": text} for text in texts])
    assert found == by_hand(texts)
    assert 1 < len(set(found)) < len(texts)


def test_texts_count_at_any_depth_and_rows_without_words_stand_alone():
    turns = [{"role": "user", "content": "what is two and two"}]
    rows = [{"messages": turns}, {"text": ""}, {"messages": turns, "n": 3}, {"text": "…"}]
    assert near_copies(rows) == [0, 1, 0, 3]


def test_a_group_is_on_one_side():
    groups = [i // 5 * 5 for i in range(100)]
    for seed in range(10):
        train, aside = split_groups(groups, 0.2, seed)
        assert sorted(train + aside) == list(range(100)) and len(aside) == 20
        assert not {groups[row] for row in train} & {groups[row] for row in aside}
    assert split_groups(groups, 0.2, 3) == split_groups(groups, 0.2, 3)
    assert split_groups(groups, 0.2, 3) != split_groups(groups, 0.2, 4)


def test_without_copies_it_is_the_usual_division():
    assert split_groups(range(50), 0.1, 7) == split_indices(50, 0.1, 7)


def test_groups_that_do_not_fit_train():
    groups = [0] * 90 + list(range(90, 100))
    train, aside = split_groups(groups, 0.2, 0)
    assert sorted(aside) == list(range(90, 100)) and len(train) == 90
    with pytest.raises(ValueError, match=r"room for a group of near copies: 2 rows.* has 10"):
        split_groups([i // 10 for i in range(100)], 2, 0)


def test_the_command_divides_by_groups_and_says_so(tiny_model_folder, tmp_path):
    rows = [
        {"instruction": f"add the numbers {i} and {i} and say the sum", "output": f"it is {k}"}
        for i in range(10)
        for k in range(3)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    options = {"model": str(tiny_model_folder), "data": str(data), "held_out": 0.2}
    prepared = prepare(Inputs(**options, group_copies=True), progress=False)
    sides = [{tuple(r["input_ids"][:-4]) for r in s} for s in (prepared.dataset, prepared.held_out)]
    assert len(prepared.held_out) == 6 and not sides[0] & sides[1]
    assert prepared.description["inputs"]["group_copies"] is True
    assert "group_copies" not in Inputs(**options).as_dict()  # runs of before can be resumed


def test_it_needs_held_out_rows():
    with pytest.raises(ValueError, match=r"group_copies divides the rows.*held_out is 0"):
        Inputs("m", "d", held_out=0.0, group_copies=True)

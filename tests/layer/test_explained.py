"""The grid of `explain`: one letter a layer, totals and distinct reasons."""

import io

import pytest
from rich.console import Console

import ila
from ila.models.explain import Explanation, LayerRow
from ila.reports.explained import explained, letter


def printed(explanation: Explanation) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(explained(explanation))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (LayerRow("a", True, "eager", ""), "o"),
        (LayerRow("a", True, "peft", ""), "P"),
        (LayerRow("a", False, "eager", "kept"), "k"),
        (LayerRow("a", False, "bare", ""), "c"),
        (LayerRow("a", False, "bare", "", in_prefix=True), "·"),
        (LayerRow("a", False, "eager", "kept", in_prefix=True), "·"),
    ],
)
def test_a_letter_says_what_a_layer_does(row, expected):
    assert letter(row) == expected


def test_32_blocks_fit_a_screen_and_every_reason_stands_once():
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    rows = [
        LayerRow(
            f"model.layers.{block}.{kind}", block > 15, *("eager", "plain LoRA"), block < 16, 8
        )
        for block in range(32)
        for kind in kinds
    ]
    text = printed(Explanation((*rows, LayerRow("lm_head", True, "peft", "DoRA")), tokens=64))
    lines = text.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= 80
    assert text.count("plain LoRA") == text.count("DoRA") == 1
    assert "49 of 97 layers open, 48 in the frozen prefix" in text
    assert "outside the blocks: lm_head" in text
    assert [line.split() for line in lines if line.split()[:1] == ["31"]] == [["31", "o", "o", "o"]]


def test_the_letters_of_a_model_are_those_of_its_mask(tiny):
    model = tiny.attached(tiny.config())
    explanation = ila.explain(model, tokens=8)
    assert all(letter(row) in "oP" for row in explanation)
    assert "o  open" in printed(explanation)

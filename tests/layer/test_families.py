"""Every family: the numbers of plain PEFT, and the parts of this library that the docs promise."""

import pytest
import torch
import transformers

import ila
from benchmarks.families.__main__ import PAGE, kept_rows, page, row
from benchmarks.families.kept import SHAPES
from benchmarks.families.models import BLOCKS, FAMILIES, build
from benchmarks.families.trial import TOLERANCE, assert_same, try_family
from ila.models.blocks import frozen_blocks

# The page names the transformers that it was made with; another one has other code.
with_this_transformers = pytest.mark.skipif(
    f"transformers {transformers.__version__}." not in PAGE.read_text("utf-8"),
    reason="docs/families.md was made with another transformers",
)
# PEFT looks for the pattern of the experts among modules, and finds them among parameters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # GPT-2's Conv1D
]


def promised(family: str) -> str:
    """Return the row of a family in the docs."""
    begin = f"| {family} |"
    (found,) = (text for text in PAGE.read_text("utf-8").splitlines() if text.startswith(begin))
    return found


def test_experts_have_a_prefix_where_only_attention_is_adapted(tiny):
    config = tiny.config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = tiny.attached(config, build("Mixtral"))
    ila.apply_mask(model, tiny.mask(model, lambda at, name: f".{BLOCKS - 1}." not in name))
    assert frozen_blocks(model) == BLOCKS - 1


@with_this_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_as_plain_peft_and_takes_the_parts_that_the_docs_name(family):
    assert row(try_family(family)) == promised(family)


@with_this_transformers
def test_the_docs_have_the_bytes_that_a_block_keeps():
    rows = kept_rows()
    assert len(rows) == len(SHAPES)
    assert rows == [promised(name) for name in SHAPES]


@with_this_transformers
def test_the_page_has_no_other_text_than_what_is_generated():
    trials = {family: promised(family) for family in FAMILIES}
    kept = [promised(name) for name in SHAPES]
    written = PAGE.read_text("utf-8")
    for text in (*trials.values(), *kept):
        assert written.count(text) == 1
    bare = page([], [])
    assert [text for text in written.splitlines() if text not in {*trials.values(), *kept}] == (
        bare.splitlines()
    )


def test_the_comparison_can_fail():
    one = torch.ones(3, dtype=torch.float64)
    right = {"loss": one[0], "a": one}
    assert_same({**right, "a": one + TOLERANCE / 2}, right)
    for wrong in ({"loss": one[0]}, {**right, "a": one + 3 * TOLERANCE}, {**right, "b": one}):
        with pytest.raises(AssertionError):
            assert_same(wrong, right)

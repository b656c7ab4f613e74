"""Borders between tokens: exact at every character, and the same whichever way they are found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ila.data import encode
from ila.data.pieces import Pieces
from ila.data.row_encoder import IGNORED

LETTERS = "ab seat.\n\t\u00e9\u65e5\U0001f642"
TEXTS = st.text(st.sampled_from(LETTERS), max_size=40)
WORDS = st.text(st.sampled_from(LETTERS), min_size=1, max_size=20)

# A ChatML that says itself which characters are the assistant's.
MASKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("trims", [False, True])
@given(text=TEXTS)
def test_tokens_before_a_character_are_those_whose_bytes_are(build, trims, text):
    tokenizer = build(trims=trims)
    pieces = Pieces(text, tokenizer)
    # A byte-level token has one letter for each of its bytes.
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(pieces.ids)]
    assert sum(sizes) == len(text.encode())
    for character in range(len(text) + 1):
        room = len(text[:character].encode())
        whole = [n for n in range(len(sizes) + 1) if sum(sizes[:n]) <= room]
        assert pieces.before(character) == whole[-1], (text, character)


@given(text=TEXTS)
def test_borders_of_a_sentencepiece_tokenizer_cover_the_text(stories260k, text):
    pieces = Pieces(text, AutoTokenizer.from_pretrained(stories260k))
    counts = [pieces.before(character) for character in range(len(text) + 1)]
    assert counts == sorted(counts)
    assert counts[-1] == len(pieces.ids)


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, **options):
        assert not options.pop("return_offsets_mapping", False)
        return {"input_ids": self.inner(text, **options)["input_ids"]}


@given(question=WORDS, answer=WORDS)
def test_a_tokenizer_without_offsets_finds_the_same_clean_border(build, question, answer):
    tokenizer, border = build(), len(question) + len("</s>")
    fast, slow = (Pieces(question + "</s>" + answer, t) for t in (tokenizer, Slow(tokenizer)))
    assert fast.ids == slow.ids
    assert fast.before(border) == slow.before(border)


@given(turns=st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=6))
def test_labels_are_the_assistant_mask_of_the_template(build, turns):
    tokenizer = build(MASKED)
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    (encoded,), _ = encode([{"messages": messages}], tokenizer, max_length=9999, progress=False)
    wanted = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded["input_ids"] == wanted["input_ids"]
    mask = [label != IGNORED for label in encoded["labels"]]
    assert mask == [bool(inside) for inside in wanted["assistant_masks"]]

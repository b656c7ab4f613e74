"""Chat templates of known models, as TRL ships them: trained on where they say, or refused."""

import copy
import re
from functools import cache
from pathlib import Path

import pytest

from ila.data import encode
from ila.data.rendering import ChatTemplate, _Rendered
from ila.data.row_encoder import IGNORED

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
MARKS = r"<\|[^|>\n ]+\|>|<[a-z_]+>|</s>|\[/?INST\]|<\uff5c[^\uff5c]+\uff5c>|<[a-z]+\|>|<\|[a-z_]+>"

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at the sky.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "look", "arguments": {"city": "Rome"}},
}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "Sunny."}


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


PAIRS = [
    turn(r, c)
    for r, c in zip(
        ("user", "assistant") * 4, "Aa. Bb. Cc. Dd. Ee. Ff. Gg. Hh.".split(), strict=True
    )
]
AGENT = [PAIRS[0], CALLS, RESULT, PAIRS[1], PAIRS[2], CALLS, RESULT, PAIRS[3]]
CONVERSATIONS = {
    "pair": PAIRS[:2],
    "pairs": PAIRS,
    "system": [turn("system", "Be kind."), *PAIRS],
    "agent": AGENT[:4],
    "agents": AGENT,
}


@pytest.fixture(scope="module")
def known(build):
    @cache
    def make(name: str):
        if not NAMES:
            pytest.skip("no templates in this version of TRL")
        tokenizer = copy.deepcopy(build())
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text("utf-8")
        marks = sorted(set(re.findall(MARKS, tokenizer.chat_template)))
        tokenizer.add_special_tokens({"extra_special_tokens": marks})
        return tokenizer

    return make


@pytest.mark.parametrize("which", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_whole_or_the_row_is_refused(known, name, which):
    tokenizer, messages = known(name), CONVERSATIONS[which]
    try:
        (encoded,), _ = encode(
            [{"messages": messages, "tools": [TOOL]}], tokenizer, max_length=99_999, progress=False
        )
    except ValueError as error:
        assert re.match(r"row 1: the chat template (refused|writes|leaves out)", str(error))
        return
    trained = [label for label in encoded["labels"] if label != IGNORED]
    rest = [i for i, label in zip(*encoded.values(), strict=True) if label == IGNORED]
    said, unsaid = tokenizer.decode(trained), tokenizer.decode(rest)
    for message in messages:
        if message["role"] == "assistant":
            assert message["content"] in said
            assert all(word in said for word in ("look", "Rome") if message.get("tool_calls"))
        elif message["role"] == "user":
            assert message["content"] in unsaid
        assert message["content"] not in (unsaid if message["role"] == "assistant" else said) or (
            message["content"] == ""
        )


@pytest.mark.parametrize("which", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_windows_find_what_the_whole_conversation_says(known, name, which):
    judge, messages = ChatTemplate(known(name)), CONVERSATIONS[which]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        text, spans = judge.render(messages, turns, [TOOL])
    except ValueError:
        return
    assert spans == _Rendered(judge, messages, [TOOL], text).in_full(turns)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_training")])
def test_what_is_trained_on_is_inside_the_mask_of_the_template(known, name):
    tokenizer, messages = known(name), PAIRS[:2]
    row = {"messages": messages}
    (encoded,), _ = encode([row], tokenizer, max_length=99_999, progress=False)
    judge = ChatTemplate(tokenizer)
    shown = judge.shown(messages)
    wanted = tokenizer.apply_chat_template(
        shown, return_dict=True, return_assistant_tokens_mask=True
    )
    count = len(encoded["input_ids"])
    assert encoded["input_ids"] == wanted["input_ids"][:count]
    inside = [bool(mask) for mask in wanted["assistant_masks"]]
    trained = [label != IGNORED for label in encoded["labels"]]
    assert not any(t and not i for t, i in zip(trained, inside[:count], strict=True))
    # What the mask holds beside it is the template's own: a header before, white space after.
    extra = [
        i for i, t, m in zip(wanted["input_ids"], trained, inside, strict=False) if m and not t
    ]
    assert "Bb" not in tokenizer.decode(extra)

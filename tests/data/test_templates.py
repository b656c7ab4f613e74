"""Chat templates: calls and tools in the text, one end token, and time linear in the turns."""

import copy
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from ila.data import encode
from ila.data.rendering import ChatTemplate, _Rendered, render_plain
from ila.data.row_encoder import IGNORED

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "sunny"}
AGENT = [USER, CALLS, RESULT, ANSWER]


@pytest.mark.parametrize(
    ("template", "call"),
    [
        ("chatml", '<tool_call>look {"city": "Rome"}</tool_call><|im_end|>'),
        ("adds_text", '<tool_call>look {"city": "Rome"}</tool_call><|im_end|>'),
        ("strict", ' [CALL]look{"city": "Rome"}</s>'),
        ("none", '{"name": "look", "arguments": {"city": "Rome"}}</s>'),
    ],
)
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_calls_are_answers_with_and_without_a_template(
    build, trained_on, template, call, arguments
):
    tokenizer = build(template)
    function = {"name": "look", "arguments": arguments}
    turns = [USER, {"role": "assistant", "tool_calls": [{"function": function}]}, RESULT, ANSWER]
    found = trained_on({"messages": turns}, tokenizer)
    assert found == [call, found[1]]
    assert found[1].strip() == "a" + tokenizer.eos_token
    assert trained_on({"messages": turns[:2]}, tokenizer) == [call]


def test_text_beside_a_call_stays_beside_it():
    turns = [USER, {**CALLS, "content": "Let me look."}]
    text, _ = render_plain(turns, [1], "</s>")
    assert text == ('q\n\nLet me look.\n{"name": "look", "arguments": {"city": "Rome"}}</s>')


@pytest.mark.parametrize("content", ["", "Let me look."])
def test_a_template_that_leaves_calls_out_is_refused(build, content):
    row = {"messages": [USER, {**CALLS, "content": content}]}
    with pytest.raises(ValueError, match=r"row 1: .*leaves out the tool calls"):
        encode([row], build("plain_chatml"), progress=False)


@pytest.mark.parametrize("template", ["none", "plain_chatml", "chatml", "strict"])
@pytest.mark.parametrize("tail", ["{end}", "{end}\n", " {end} \n{end}", "{end}{end}"])
def test_an_answer_that_ends_in_the_end_token_gets_no_second_one(build, trained_on, template, tail):
    tokenizer = build(template)
    end = tokenizer.eos_token
    for row in (
        {"prompt": "Q: a", "completion": "b" + tail.format(end=end)},
        {"messages": [USER, {**ANSWER, "content": "b" + tail.format(end=end)}, USER, ANSWER]},
    ):
        for found in trained_on(row, tokenizer):
            assert found.count(end) == 1
            assert found.endswith(end)


@pytest.mark.parametrize("template", ["none", "chatml"])
def test_plain_text_has_its_end_and_its_beginning_once(build, template):
    tokenizer = build(template)
    (once, twice), _ = encode(
        [{"text": "once"}, {"text": "once" + tokenizer.eos_token}], tokenizer, progress=False
    )
    assert once == twice


def test_plain_text_that_begins_with_the_opening_token_gets_no_second_one(build):
    tokenizer = copy.deepcopy(build())
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=begin
    )
    (plain, marked), _ = encode([{"text": "once"}, {"text": "<s>once"}], tokenizer, progress=False)
    assert plain == marked
    assert plain["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_template_of_two_ends_cuts_either(build, trained_on):
    phi = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = copy.deepcopy(build(phi))
    tokenizer.eos_token = "</s>"
    for tail in ("", "<|im_end|>", "</s>", "<|im_end|></s>"):
        row = {"question": "q", "answer": "b" + tail}
        assert trained_on(row, tokenizer) == ["b<|im_end|></s>"]


# -- errors of a template are errors of the template


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ 'x' * 10**13 }}", "MemoryError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[9].role.x }}", "UndefinedError"),
        ("{% for", "TemplateSyntaxError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].content + 3 }}", "TypeError"),
        ("{{ '' | no_such_filter }}", "TemplateAssertionError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
    ],
)
def test_an_error_of_a_template_names_the_template(build, template, what):
    tokenizer = copy.deepcopy(build(template))
    tokenizer.name_or_path = "models/mine"
    message = f"row 1: the chat template of models/mine refused .*user, assistant: {what}"
    with pytest.raises(ValueError, match=message):
        encode([{"question": "q", "answer": "a"}], tokenizer, progress=False)


def test_an_error_of_a_long_conversation_is_short(build):
    with pytest.raises(ValueError, match="refused") as caught:
        encode([{"messages": [USER, ANSWER] * 900}], build("{{ 1 / 0 }}"), progress=False)
    assert len(str(caught.value)) < 300


# -- windows: the same answers as with all turns before them

CONTENTS = st.text(st.sampled_from("ab \n[</>{}]"), min_size=1, max_size=8).filter(str.strip)
TURN_PAIRS = st.lists(st.tuples(CONTENTS, CONTENTS, st.booleans()), min_size=1, max_size=7)


@pytest.mark.parametrize("template", ["plain_chatml", "chatml", "adds_text", "strict"])
@given(pairs=TURN_PAIRS, system=st.booleans(), skipped=st.sets(st.integers(0, 6)))
def test_windows_find_what_the_whole_conversation_says(build, template, pairs, system, skipped):
    messages = [{"role": "system", "content": "s"}] if system else []
    for asked, answered, calls in pairs:
        messages.append({"role": "user", "content": asked})
        if calls and template != "plain_chatml":
            messages += [CALLS, RESULT]
        messages.append({"role": "assistant", "content": answered})
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    turns = [i for n, i in enumerate(answers) if n not in skipped or i == answers[-1]]
    judge = ChatTemplate(build(template))
    text, spans = judge.render(messages, turns)
    whole = _Rendered(judge, messages, None, text)
    assert spans == whole.in_full(turns) == whole.in_windows(turns)


def test_a_template_that_counts_turns_is_judged_by_all_of_them(build):
    counts = (
        "{% for m in messages %}{{ loop.index ~ m.role ~ ':' ~ m.content ~ eos_token }}{% endfor %}"
    )
    judge, messages = ChatTemplate(build(counts)), [USER, ANSWER] * 4
    turns = [1, 3, 5, 7]
    text, spans = judge.render(messages, turns)
    whole = _Rendered(judge, messages, None, text)
    assert whole.in_windows(turns) is None
    assert spans == whole.in_full(turns)
    assert [text[begin:end] for begin, end in spans] == [f"{i + 1}assistant:a</s>" for i in turns]


# -- length


def long_row(pairs: int, text: str = "How many seats are there? ") -> dict:
    return {
        "messages": [
            m
            for i in range(pairs)
            for m in ({"role": "user", "content": f"{i}"}, {"role": "assistant", "content": text})
        ]
    }


@pytest.mark.parametrize("template", ["none", "plain_chatml", "chatml", "strict"])
@pytest.mark.parametrize("max_length", [2, 30, 200, 1000])
def test_a_cut_row_is_the_beginning_of_the_whole(build, template, max_length):
    tokenizer, row = build(template), long_row(120)
    (whole,), summary = encode([row], tokenizer, max_length=10**5, progress=False)
    assert summary.truncated == 0
    assert len(whole["input_ids"]) > 1000
    if all(label == IGNORED for label in whole["labels"][:max_length]):
        with pytest.raises(ValueError, match="1 with no answer token within"):
            encode([row], tokenizer, max_length=max_length, progress=False)
        return
    (cut,), summary = encode([row], tokenizer, max_length=max_length, progress=False)
    assert summary.truncated == 1
    assert cut == {name: values[:max_length] for name, values in whole.items()}


@pytest.mark.parametrize("template", ["none", "plain_chatml"])
def test_one_long_text_is_cut_as_one_that_fits(build, template):
    tokenizer = build(template)
    row = {"question": "q", "answer": "many seats " * 20_000}
    (whole,), _ = encode([row], tokenizer, max_length=10**6, progress=False)
    (cut,), summary = encode([row], tokenizer, max_length=100, progress=False)
    assert summary.truncated == 1
    assert cut == {name: values[:100] for name, values in whole.items()}


class Counting:
    """A tokenizer that counts the messages it renders and the characters it reads."""

    def __init__(self, inner):
        self.inner, self.messages, self.characters = inner, 0, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.inner(text, **options)

    def apply_chat_template(self, messages, **options):
        self.messages += len(messages)
        return self.inner.apply_chat_template(messages, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("template", ["plain_chatml", "chatml", "strict"])
def test_work_is_linear_in_the_turns_and_bounded_by_the_cut(build, template):
    def work(pairs: int, max_length: int) -> tuple[int, int]:
        counting = Counting(build(template))
        encode([long_row(pairs)], counting, max_length=max_length, progress=False)
        return counting.messages, counting.characters

    for one, two in zip(work(100, 10**6), work(200, 10**6), strict=True):
        assert two < 2.2 * one
    assert work(200, 500) == work(800, 500)


def test_a_row_of_two_hundred_turns_takes_no_time(build):
    tokenizer, row = build("chatml"), long_row(100)
    encode([row], tokenizer, progress=False)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        encode([row], tokenizer, max_length=1024, progress=False)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.3


# ---- what the guide says of templates


NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_template_without_an_end_of_turn_trains_no_end(build, trained_on):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert [text.strip() for text in trained_on(row, build(NO_END))] == ["b", "d"]


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_arguments_as_json_text_are_encoded_once(arguments, build, trained_on):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    row = {
        "messages": [
            {"role": "user", "content": "where?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
    }
    (text,) = trained_on(row, build("chatml"))
    assert '<tool_call>look {"city": "Rome"}</tool_call>' in text

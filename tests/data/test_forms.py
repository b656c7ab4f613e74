"""Conversations as people store them: used, or refused by name; never passed over in silence."""

import json

import pytest

from ila.data import encode
from ila.data.messages import to_conversation, to_messages

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}


def chat(*turns: tuple[str, str] | dict) -> dict:
    whole = [t if isinstance(t, dict) else {"from": t[0], "value": t[1]} for t in turns]
    return {"conversations": whole}


# -- roles


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *((name, "user") for name in ("user", "human", "Human", "USER", "prompter", " user ")),
        *(
            (name, "assistant")
            for name in ("assistant", "Assistant", "gpt", "GPT", "chatgpt", "GPT-4", "model")
        ),
        *((name, "assistant") for name in ("Model", "bing", "bard", "claude", "bot", "AI")),
        *((name, "tool") for name in ("tool", "observation", "function", "ipython")),
        *((name, "tool") for name in ("tool_response", "function-response", "Tool Result")),
        *((name, name) for name in ("system", "developer")),
    ],
)
def test_roles_of_other_tools_mean_one_of_ours(said, meant):
    assert to_messages(chat((said, "x"))) == [{"role": meant, "content": "x"}]
    assert to_messages({"messages": [{"role": said, "content": "x"}]})[0]["role"] == meant


@pytest.mark.parametrize("said", ["narrator", "", "text", "usr", "assistent", "critic"])
def test_unknown_role_is_refused_by_name(said):
    with pytest.raises(ValueError, match=f"role '{said}' is not understood; understood: system"):
        to_messages(chat(("human", "q"), (said, "x")))


@pytest.mark.parametrize("said", ["gpt", "Assistant", "model", "bing", "GPT-4"])
@pytest.mark.parametrize("template", ["none", "plain_chatml"])
def test_answers_of_other_tools_are_trained_on(build, trained_on, said, template):
    tokenizer = build(template)
    row = chat(("Human", "q"), (said, "one"), ("human", "q"), (said, "two"))
    end = tokenizer.eos_token
    assert trained_on(row, tokenizer) == [f"one{end}", f"two{end}"]


@pytest.mark.parametrize("keys", [("role", "text"), ("from", "message"), ("role", "parts")])
def test_text_under_an_unknown_name_is_refused_not_read_as_empty(keys):
    with pytest.raises(ValueError, match="must have content"):
        to_messages({"messages": [USER, {keys[0]: "assistant", keys[1]: "a"}]})


# -- calls of tools, in the forms of LLaMA-Factory, ms-swift and OpenAI (old and new)


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Rome"}}'},
        {"from": "tool_call", "value": '[{"name": "look", "arguments": {"city": "Rome"}}]'},
        {"from": "function-call", "value": {"name": "look", "arguments": {"city": "Rome"}}},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "look", "arguments": '{"city": "Rome"}'}}],
        },
        {
            "role": "assistant",
            "function_call": {"name": "look", "arguments": '{"city": "Rome"}'},
        },
    ],
)
def test_forms_of_one_call_are_one_call(turn):
    assert to_messages({"messages": [USER, turn]})[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
    }


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (("function_call", "look up Rome"), "role 'function_call' must be JSON"),
        (("function_call", "[]"), "must hold a call"),
        (("tool_call", '{"arguments": {}}'), "a tool call must have a name"),
        ({"role": "assistant", "tool_calls": {"name": "look"}}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": ["look"]}, "a tool call must have a name"),
    ],
)
def test_calls_that_are_none_are_refused(turn, message):
    with pytest.raises(ValueError, match=message):
        to_messages(chat(("human", "q"), turn))


def test_arguments_that_are_no_json_stay_as_the_model_wrote_them():
    call = {"name": "look", "arguments": "{city: Rome"}
    (found,) = to_messages(chat({"role": "gpt", "tool_calls": [call]}))[0]["tool_calls"]
    assert found["function"] == call


# -- tools of a row


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        TOOL,
        json.dumps(TOOL),
        (TOOL,),
    ],
)
def test_tools_reach_the_template(build, tools):
    tokenizer = build("chatml")
    row = {"messages": [USER, ANSWER], "tools": tools}
    (encoded,), summary = encode([row], tokenizer, progress=False)
    wanted = tokenizer.apply_chat_template(row["messages"], tools=[TOOL], tokenize=False)
    assert tokenizer.decode(encoded["input_ids"]) == wanted
    assert summary.unused == ()


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null", float("nan")])
def test_no_tools_are_none(tools):
    assert to_conversation({"messages": [USER, ANSWER], "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("tools", "message"),
    [("look", "tools must be JSON"), ("3", "tools must be a list"), (["3"], "descriptions")],
)
def test_tools_that_are_none_are_refused(tools, message):
    with pytest.raises(ValueError, match=message):
        to_messages({"messages": [USER, ANSWER], "tools": tools})


@pytest.mark.parametrize("template", ["plain_chatml", "none"])
def test_tools_that_the_text_does_not_show_are_named(build, template):
    row = {"messages": [USER, ANSWER], "tools": [TOOL]}
    _, summary = encode([row], build(template), progress=False)
    assert summary.unused == ("tools",)
    assert str(summary).endswith(" Not used: tools.")


# -- history


@pytest.mark.parametrize(
    "history",
    [
        [["q1", "a1"], ["q2", "a2"]],
        [("q1", "a1"), ("q2", "a2")],
        '[["q1", "a1"], ["q2", "a2"]]',
        [
            *({"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}),
            *({"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}),
        ],
    ],
)
def test_history_comes_before_the_prompt_and_is_trained_on(build, trained_on, history):
    row = {"system": "s", "instruction": "q", "input": "x", "output": "a", "history": history}
    said = [(m["role"], m["content"]) for m in to_messages(row)]
    rounds = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert said == [("system", "s"), *rounds, ("user", "q\n\nx"), ("assistant", "a")]
    assert trained_on(row, build()) == ["a1</s>", "a2</s>", "a</s>"]


@pytest.mark.parametrize("history", [None, [], "", "[]", float("nan")])
def test_no_history_is_none(history):
    assert to_messages({"prompt": "q", "completion": "a", "history": history}) == [USER, ANSWER]


@pytest.mark.parametrize("history", ["before", [["q"]], [["q", "a", "b"]], ["qa"], 3, {"q": "a"}])
def test_history_of_another_form_is_refused(history):
    with pytest.raises(ValueError, match="history must"):
        to_messages({"prompt": "q", "completion": "a", "history": history})


# -- columns that are not read


def test_columns_that_are_not_read_are_named(build):
    rows = [
        {"question": "q", "answer": "a", "id": 7, "text": "Q: q A: a", "note": None},
        {"messages": [USER, ANSWER], "history": [["q", "a"]], "system": "", "source": "web"},
        {"text": "once", "tools": [TOOL], "system": "s"},
        {"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"},
        {"messages": [USER, {**ANSWER, "reasoning_content": "hm", "tool_call_id": "1"}]},
    ]
    _, summary = encode(rows, build(), progress=False)
    wanted = {"id", "text", "history", "source", "tools", "system", "messages.reasoning_content"}
    assert set(summary.unused) == wanted
    assert json.loads(json.dumps(summary.as_dict())) == summary.as_dict()
    _, clean = encode(rows[2:3], build(), progress=False)
    assert clean.unused == ("tools", "system")


def test_keys_that_the_template_reads_are_used(build):
    thinks = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }};{% endfor %}"
    row = {"messages": [USER, {**ANSWER, "thinking": "hm", "mood": "calm"}]}
    _, summary = encode([row], build(thinks), progress=False)
    assert summary.unused == ("messages.mood",)


# -- flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("weight", value) for value in (0, 0.0, False, "0")),
        *((flag, value) for flag in ("train", "training", "loss") for value in (False, 0, "false")),
        *(("label", value) for value in (False, 0)),
    ],
)
@pytest.mark.parametrize("template", ["none", "plain_chatml"])
def test_a_turn_that_is_flagged_is_not_trained_on(build, trained_on, template, flag, value):
    tokenizer = build(template)
    row = {"messages": [USER, {**ANSWER, flag: value}, USER, {**ANSWER, flag: 1}]}
    assert trained_on(row, tokenizer) == ["a" + tokenizer.eos_token]
    text = tokenizer.decode(encode([row], tokenizer, progress=False)[0][0]["input_ids"])
    assert text.count("a" + tokenizer.eos_token) == 2
    with pytest.raises(ValueError, match="1 without an answer"):
        encode([{"messages": row["messages"][:2]}], tokenizer, progress=False)


@pytest.mark.parametrize(("flag", "value"), [("train", False), ("weight", 0), ("label", False)])
@pytest.mark.parametrize("text", [False, 0, "0", "False"])
@pytest.mark.parametrize(
    "row", [{"messages": [USER, ANSWER]}, {"prompt": "q", "completion": "a"}, {"text": "once"}]
)
def test_a_row_that_is_flagged_is_not_trained_on(build, row, flag, value, text):
    value = text if flag != "label" or str(text) == "False" else value
    kept, summary = encode([{**row, flag: value}, {**row, flag: True}], build(), progress=False)
    assert (len(kept), summary.dropped_no_answer, summary.unused) == (1, 1, ())


@pytest.mark.parametrize("flag", ["weight", "train", "loss", "label"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "half", [1]])
def test_a_weight_that_is_neither_is_refused_by_name(flag, value):
    with pytest.raises(ValueError, match=f"{flag} says whether to train on it and must be 0 or 1"):
        to_messages({"messages": [USER, {**ANSWER, flag: value}]})


@pytest.mark.parametrize("flag", ["weight", "train"])
def test_a_fractional_weight_of_a_row_is_refused_by_name(flag):
    with pytest.raises(ValueError, match=f"{flag} says whether .* got 0.5"):
        to_messages({"question": "q", "answer": "a", flag: 0.5})


def test_a_label_that_is_a_class_is_no_flag():
    assert to_conversation({"text": "once", "label": 0}).unused == ("label",)
    assert to_conversation({"question": "q", "answer": "a", "label": "math"}).unused == ("label",)
    with pytest.raises(ValueError, match=r"label must be true or false .*, got 0; rename"):
        to_messages({"question": "q", "answer": "a", "label": 0})


@pytest.mark.parametrize("flag", ["train_detail", "loss_scale", "loss_weight", "mask"])
def test_a_flag_that_is_not_understood_is_refused_by_name(flag):
    with pytest.raises(ValueError, match=f"{flag} of a message is not supported"):
        to_messages({"messages": [USER, {**ANSWER, flag: [{"begin_offset": 0}]}]})


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_asking_to_train_on_another_role_is_refused(role):
    turn = {"role": role, "content": "x"}
    with pytest.raises(ValueError, match=f"train asks to train on a turn of role {role}"):
        to_messages({"messages": [{**turn, "train": True}, ANSWER]})
    assert to_messages({"messages": [{**turn, "weight": 1}, ANSWER]}) == [turn, ANSWER]
    assert to_messages({"messages": [{**turn, "train": None}, ANSWER]}) == [turn, ANSWER]


def test_flags_of_a_turn_do_not_reach_the_template():
    turn = {**ANSWER, "train": True, "weight": 1, "label": True, "loss": None}
    assert to_messages({"messages": [USER, turn]}) == [USER, ANSWER]

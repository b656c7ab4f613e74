"""Tokens: the loss is on the answers, the whole answers and nothing but the answers."""

import pickle
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ila.data.encoding import IGNORED, Collator, DataSummary, encode, pad_token_id
from ila.data.rows import load_rows, to_messages

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("arithmetic", "polite", "extraction")
STORIES = ROOT.parent / "shared" / "models" / "stories260K"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2's form: no generation prompt, system prompt inside the first user turn.
INST = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>' + messages[0].content + "
    "'<</SYS>>' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + "
    "m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# Mistral's way with a system prompt: it stands in the last user turn, so earlier text changes.
MOVING = (
    "{% set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (system if loop.last or loop.revindex == 2 else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# A generation prompt that opens a thought which past turns do not have.
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
MUTE = "{% for m in messages if m.role != 'assistant' %}{{ m.content }};{% endfor %}"

CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How many seats?"},
        {"role": "assistant", "content": "Seats: 3 * 4 = 12."},
        {"role": "user", "content": "Thank you."},
        {"role": "assistant", "content": "With kind regards"},
    ]
}


def build(template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens, trained on the example sets."""
    rows = [row for name in EXAMPLES for row in load_rows(ROOT / f"examples/data/{name}.jsonl")]
    texts = ["\n".join(m["content"] for m in to_messages(row)) for row in rows[::4]]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    eos = "<|im_end|>" if template and "im_end" in template else "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def plain():
    return build(bos=True)


@pytest.fixture(scope="module")
def chatml():
    return build(CHATML)


def answers(encoded: dict, tokenizer) -> list[str]:
    """The stretches that carry loss, as text."""
    found, run = [], []
    for token, label in [*zip(encoded["input_ids"], encoded["labels"], strict=True), (0, IGNORED)]:
        if label != IGNORED:
            assert label == token
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


def one(row: dict, tokenizer, **options) -> dict:
    encoded, _ = encode([row], tokenizer, progress=False, **options)
    return encoded[0]


def test_plain_template_is_the_documented_one(plain):
    encoded = one({"instruction": "Reply.", "input": "Lamp?", "output": "Dear Ada,"}, plain)
    assert plain.decode(encoded["input_ids"]) == "<s>Reply.\n\nLamp?\n\nDear Ada,</s>"
    assert answers(encoded, plain) == ["Dear Ada,</s>"]


def test_every_assistant_turn_carries_loss_in_the_plain_template(plain):
    encoded = one(CHAT, plain)
    text = "<s>Be kind.\n\nHow many seats?\n\nSeats: 3 * 4 = 12.</s>Thank you.\n\n"
    assert plain.decode(encoded["input_ids"]) == text + "With kind regards</s>"
    assert answers(encoded, plain) == ["Seats: 3 * 4 = 12.</s>", "With kind regards</s>"]


def test_every_assistant_turn_carries_loss_in_a_chat_template(chatml):
    encoded = one(CHAT, chatml)
    rendered = chatml.apply_chat_template(CHAT["messages"], tokenize=False)
    assert chatml.decode(encoded["input_ids"]) == rendered
    wanted = ["Seats: 3 * 4 = 12.<|im_end|>", "With kind regards<|im_end|>"]
    assert answers(encoded, chatml) == wanted


def test_template_without_generation_prompt_and_with_trimming():
    tokenizer = build(INST, bos=True)
    encoded = one(CHAT, tokenizer)
    assert tokenizer.decode(encoded["input_ids"]).startswith("<s>[INST] <<SYS>>Be kind.")
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 2
    wanted = [" Seats: 3 * 4 = 12. </s>", " With kind regards </s>"]
    assert answers(encoded, tokenizer) == wanted


def test_generation_prompt_that_opens_a_thought_is_left_behind():
    tokenizer = build(THINKING)
    assert answers(one({"question": "q", "answer": "Dear Ada"}, tokenizer), tokenizer) == [
        "Dear Ada<|im_end|>"
    ]


@pytest.mark.parametrize("template", [MOVING, MUTE])
def test_template_that_hides_its_answers_is_refused(template):
    with pytest.raises(ValueError, match=r"row 1: the chat template writes earlier turns"):
        encode([CHAT], build(template), progress=False)


def test_moving_system_prompt_is_fine_with_one_turn():
    tokenizer = build(MOVING)
    row = {"messages": CHAT["messages"][:3]}
    assert answers(one(row, tokenizer), tokenizer) == ["Seats: 3 * 4 = 12.</s>"]


def test_template_error_names_row_and_roles():
    row = {"messages": [CHAT["messages"][1], CHAT["messages"][1], CHAT["messages"][2]]}
    message = r"row 2: the chat template refused .*user, user.*: roles must alternate"
    with pytest.raises(ValueError, match=message):
        encode([CHAT, row], build(INST), progress=False)


def test_answer_that_merges_with_the_prompt_keeps_its_first_token(chatml):
    encoded = one({"question": "q", "answer": "\n\nDear"}, chatml)
    assert "Dear<|im_end|>" in answers(encoded, chatml)[0]
    assert chatml.decode(encoded["input_ids"]).endswith("assistant\n\n\nDear<|im_end|>\n")


@pytest.mark.parametrize("text", ["Grüße 🙂 ok", "日本", "  two  spaces\n", "a\u2028b", "e\u0301"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_unicode_answers_survive_whole(template, text):
    tokenizer = build(template)
    encoded = one({"question": "Größe?", "answer": text}, tokenizer)
    assert answers(encoded, tokenizer) == [text + tokenizer.eos_token]


def test_plain_text_is_all_answer_but_its_first_token(plain, chatml):
    encoded = one({"text": "There are boxes."}, plain)
    assert answers(encoded, plain) == ["There are boxes.</s>"]
    encoded = one({"text": "There are boxes."}, chatml)
    assert chatml.decode(encoded["input_ids"]) == "There are boxes.<|im_end|>"
    assert encoded["labels"] == [IGNORED, *encoded["input_ids"][1:]]


def test_weight_zero_and_opening_assistant_turns_carry_no_loss(chatml):
    greeting = {"role": "assistant", "content": "Hello"}
    muted = {**CHAT["messages"][2], "weight": 0}
    row = {"messages": [greeting, CHAT["messages"][1], muted, *CHAT["messages"][3:]]}
    assert answers(one(row, chatml), chatml) == ["With kind regards<|im_end|>"]
    row = {"prompt": CHAT["messages"][:4], "completion": "yes"}
    assert answers(one(row, chatml), chatml) == ["yes<|im_end|>"]


def test_turns_after_the_last_answer_are_left_out(chatml):
    cut = one({"messages": CHAT["messages"][:3]}, chatml)
    assert one({"messages": CHAT["messages"][:4]}, chatml) == cut
    empty = {"role": "assistant", "content": " "}
    assert one({"messages": [*CHAT["messages"][:4], empty]}, chatml) == cut


@pytest.mark.parametrize("template", [None, CHATML])
def test_truncation_keeps_a_row_from_its_first_answer_token_on(template):
    tokenizer = build(template, bos=True)
    row = {"question": "How many seats?", "answer": "Seats: 12"}
    whole = one(row, tokenizer)
    first = next(i for i, label in enumerate(whole["labels"]) if label != IGNORED)
    size = len(whole["input_ids"])
    kept, summary = encode([row], tokenizer, max_length=first + 1, progress=False)
    assert (summary.kept, summary.truncated, summary.answer_tokens) == (1, 1, 1)
    assert kept[0]["labels"] == whole["labels"][: first + 1]
    with pytest.raises(ValueError, match=f"1 with no answer token within max_length={first}"):
        encode([row], tokenizer, max_length=first, progress=False)
    assert encode([row], tokenizer, max_length=size, progress=False)[1].truncated == 0
    assert encode([row], tokenizer, max_length=size - 1, progress=False)[1].truncated == 1


def test_summary_counts_every_row_once(plain):
    rows = [
        {"question": "q", "answer": "Dear"},
        {"question": "q", "answer": ""},
        {"question": "q", "answer": None},
        {"question": "q"},
        {"question": "a very long question " * 9, "answer": "no room"},
        {"question": "q", "answer": "a very long answer " * 9},
        {"messages": []},
        {"text": " \n"},
    ]
    encoded, summary = encode(rows, plain, max_length=20, progress=False)
    assert summary == DataSummary(
        rows=8,
        kept=2,
        truncated=1,
        dropped_no_answer=5,
        dropped_no_room=1,
        tokens=sum(len(row["input_ids"]) for row in encoded),
        answer_tokens=sum(label != IGNORED for row in encoded for label in row["labels"]),
    )
    assert summary.as_dict()["dropped_no_answer"] == 5
    assert str(summary).startswith(
        "2 of 8 rows, 1 truncated, 5 dropped without an answer, 1 dropped with no room for one "
    )
    _, whole = encode(rows[:1], plain, progress=False)
    assert str(whole) == (
        f"1 of 1 rows; {whole.tokens} tokens, {whole.answer_tokens} of them in answers."
    )


def test_no_row_keeps_only_a_first_token_that_nothing_predicts():
    tokenizer = build()
    tokenizer.eos_token = None
    row = {"text": "a"}
    encoded, _ = encode([row, {"text": "boxes and bags"}], tokenizer, progress=False)
    assert all(any(label != IGNORED for label in row["labels"][1:]) for row in encoded)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows must hold at least one row"),
        ([{"text": "a"}], {"max_length": 1}, "max_length must be at least 2, got 1"),
        ([{"text": ""}, {"text": None}], {}, "all 2 were dropped, 2 without an answer .*'text'"),
        ([{"text": "a"}, {"body": "b"}], {}, r"row 2: row has no known form"),
        ([{"text": "a"}, "b"], {}, r"row 2: a row must be a dict, got str"),
    ],
)
def test_unusable_rows_are_refused(plain, rows, options, message):
    with pytest.raises(ValueError, match=message):
        encode(rows, plain, progress=False, **options)


def test_progress_never_writes_to_stdout_nor_changes_rows(plain, capsys, monkeypatch):
    rows = [{"text": "a b"}] * 3
    wanted = encode(rows, plain)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("ila.data.encoding._ROWS_WORTH_A_BAR", 2)
    assert encode(rows, plain) == wanted
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("template", [None, CHATML, INST])
def test_example_sets_are_kept_whole(name, template):
    rows = load_rows(ROOT / f"examples/data/{name}.jsonl", limit=20)
    tokenizer = build(template, bos=True)
    encoded, summary = encode(rows, tokenizer, progress=False)
    assert (summary.kept, summary.truncated) == (20, 0)
    for row, result in zip(rows, encoded, strict=True):
        answer = to_messages(row)[-1]["content"]
        (found,) = answers(result, tokenizer)
        assert found.removesuffix(tokenizer.eos_token).strip() == answer
        assert found.endswith(tokenizer.eos_token)


@pytest.mark.skipif(not STORIES.exists(), reason="stories260K is not here")
@pytest.mark.parametrize("template", [None, INST])
def test_real_sentencepiece_tokenizer(template):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = template
    encoded = one(CHAT, tokenizer)
    found = [text.strip() for text in answers(encoded, tokenizer)]
    assert [text.removesuffix("</s>").strip() for text in found] == [
        "Seats: 3 * 4 = 12.",
        "With kind regards",
    ]
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    # Generation starts from the prompt alone: its tokens are those that were trained on.
    row = {"question": "Once upon a time", "answer": "there was a dog."}
    encoded = one(row, tokenizer)
    first = next(i for i, label in enumerate(encoded["labels"]) if label != IGNORED)
    if template is None:
        assert encoded["input_ids"][:first] == tokenizer("Once upon a time\n\n")["input_ids"]


def test_collator_pads_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "labels": [IGNORED]},
    ]
    batch = Collator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "length"), [(None, 3), (1, 3), (3, 3), (2, 4), (8, 8)])
def test_collator_rounds_the_length_up(multiple, length):
    collator = pickle.loads(pickle.dumps(Collator(0, multiple)))
    batch = collator([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, length)}


def test_collator_refuses_nonsense():
    with pytest.raises(ValueError, match="pad_to_multiple_of must be None or at least 1, got 0"):
        Collator(0, 0)
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        Collator(0)([])


def test_pad_token_is_pad_then_eos_then_an_error():
    tokenizer = build()
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<pad>")
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("</s>")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="pad_token or an eos_token"):
        pad_token_id(tokenizer)

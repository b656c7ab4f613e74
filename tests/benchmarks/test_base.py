"""The small Llama: what it reads, what it does not read, and a pretraining of a few steps."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.base import pretrain, texts


@pytest.fixture(scope="module")
def rows():
    return texts.docstring_rows()


def test_rows_are_functions_with_their_docstrings(rows):
    assert len(rows) > 1000
    assert {tuple(row) for row in rows} == {("instruction", "input", "output")}
    for row in rows:
        assert row["input"].startswith(("def ", "async def ", "@")) and len(row["output"]) >= 20
    # The answer is not in the question.
    assert not any(row["output"] in row["input"] for row in rows)


def test_no_function_of_the_data_set_is_read(rows):
    halves = [list(texts._sources(read=read)) for read in (True, False)]
    assert all(len(half) > 200 for half in halves)
    assert all(len(source) < 100 for source in set(halves[0]) & set(halves[1]))
    read = "\n".join(halves[0])
    seen = sum(row["output"] in read for row in rows)
    assert seen < 0.05 * len(rows)  # a docstring that functions of two modules share


def test_texts_are_those_of_the_files(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "instruct").mkdir()
    (tmp_path / texts.STORIES).write_text("One.<|endoftext|>\nTwo.", encoding="utf-8")
    for name in texts.INSTRUCT:
        (tmp_path / name).write_text('{"question": "Why?", "answer": "So."}\n', encoding="utf-8")
    found = texts.texts(tmp_path)
    assert found[:2] == ["One.", "Two."] and found[2:5] == ["Why?\nSo."] * 3
    assert found[5:] == [text.strip() for text in texts._sources(read=True) if text.strip()]


@pytest.fixture
def small(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    monkeypatch.setattr(pretrain, "SHAPE", {**pretrain.SHAPE, **shape, "num_attention_heads": 2})
    monkeypatch.setitem(pretrain.SHAPE, "num_key_value_heads", 2)
    monkeypatch.setattr(pretrain, "LENGTH", 16)


def test_a_seed_makes_the_same_model_twice_and_it_learns(small, tmp_path):
    read = [f"{a} and {b} make {a + b}." for a in range(40) for b in range(20)]
    first, again = (
        pretrain.pretrain(read, tmp_path / name, progress=False) for name in ("one", "two")
    )
    assert first == again
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, two)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    text = "3 and 4 make 7: naïve\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    untrained = pretrain.pretrain(read, tmp_path / "three", steps=1, progress=False)
    assert first < untrained - 0.5


def test_tokens_keep_their_order_and_texts_their_ends(small):
    read = [f"{n} sheep" for n in range(100)]
    tokenizer = pretrain.learn_tokenizer(read, vocabulary=300)
    rows = pretrain.packed(read, tokenizer)
    assert rows.shape[1] == 16
    assert tokenizer.decode(rows.flatten()).startswith("0 sheep<|endoftext|>1 sheep<|endoftext|>")

"""Rows: what is read is what stands in the file, and what is wrong is said with its place."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ila.data.rows import fingerprint, load_rows, split_indices, to_messages

ROWS = [
    {"question": "Größe? 🙂", "answer": "drei"},
    {"question": "a line\u2028separator", "answer": "kept"},
    {"question": "2 + 2", "answer": "4"},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("lines.json", LINES),
        ("array.json", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("data.json", json.dumps({"version": 1, "data": ROWS})),
        ("rows.json", json.dumps({"rows": ROWS})),
        ("train.json", json.dumps({"train": ROWS, "test": []})),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("blank_lines.jsonl", "\n\n" + LINES.replace("\n", "\n  \n") + "\n\n"),
        ("windows.jsonl", LINES.replace("\n", "\r\n")),
        ("UPPER.JSONL", LINES),
    ],
)
def test_every_json_form_gives_the_same_rows(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert load_rows(path) == ROWS
    assert load_rows(str(path), limit=2) == ROWS[:2]
    assert load_rows(path, limit=99) == ROWS


def test_single_object_is_one_row(tmp_path):
    path = write(tmp_path, "one.json", json.dumps(ROWS[0]))
    assert load_rows(path) == ROWS[:1]


def test_json_object_holds_other_splits(tmp_path):
    path = write(tmp_path, "splits.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert load_rows(path, split="test") == ROWS[:1]
    with pytest.raises(ValueError, match="array under 'dev', got keys"):
        load_rows(path, split="dev")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_other_split_of_a_plain_file_is_refused(tmp_path, name):
    path = write(tmp_path, name, "[]" if name.endswith("json") else LINES)
    with pytest.raises(ValueError, match="split must be 'train'"):
        load_rows(path, split="test")


def test_csv_keeps_text_as_it_stands(tmp_path):
    text = '\ufeffquestion, answer\r\n"a, ""b""\nc",007\r\n\r\nü,true\r\nshort\r\n'
    assert load_rows(write(tmp_path, "rows.csv", text)) == [
        {"question": 'a, "b"\nc', "answer": "007"},
        {"question": "ü", "answer": "true"},
        {"question": "short", "answer": None},
    ]


def test_parquet_keeps_values_and_nested_messages(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"messages": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet") == rows
    assert load_rows(tmp_path / "rows.parquet", limit=1) == rows[:1]
    assert to_messages(rows[1]) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": oops}\n', "line 3, column 10: not JSON"),
        ("b.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2, column .*: not JSON"),
        ("c.jsonl", '{"text": "a"}\n[1]\n', "line 2: a row must be a JSON object, got list"),
        ("d.json", '[{"text": "a"},\n {"text": }]', "line 2, column 11: not JSON"),
        ("e.json", '{"text": "a"}\n{"text"}', "line 2, column 8: not JSON"),
        ("f.json", '[{"text": "a"}, 3]', r"row 2: a row must be a JSON object, got int"),
        ("g.json", '{"items": [1]}', "'train', 'data' or 'rows', got keys .'items'"),
        ("h.json", '"text"', "expected a JSON array"),
        ("i.json", "", "no rows"),
        ("j.json", "[]", "no rows"),
        ("k.jsonl", "\n \n", "no rows"),
        ("l.csv", "", "no rows"),
        ("m.csv", "question,answer\n", "no rows"),
        ("n.csv", "question,answer\na,b\nc,d,e\n", "line 3: more than the header's 2 values"),
        ("o.csv", 'question,answer\na,"b\n', "not CSV"),
        ("p.parquet", "no table", "not Parquet"),
        ("q.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("r.jsonl", "\ufeff{}".encode("utf-16"), "line 1: not UTF-8"),
        ("s.txt", "text", r"expected a file ending in \.json"),
    ],
)
def test_bad_file_is_refused_with_its_place(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match=f"limit must be None or at least 1, got {limit}"):
        load_rows(write(tmp_path, "a.jsonl", LINES), limit=limit)


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got the folder"):
        load_rows(tmp_path)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/a/b/c", "~/no.csv", "a/b/c"])
def test_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rows(source)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: records the request and gives three rows, or fails as told."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(calls[0], Exception):
            raise calls[0]
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_id_is_loaded_without_code(hub):
    assert load_rows("owner/name", split="test", limit=2) == ROWS[:2]
    assert load_rows("owner/name-2.5:main") == ROWS
    assert hub == [
        (("owner/name", None), {"split": "test"}),
        (("owner/name-2.5", "main"), {"split": "train"}),
    ]


def test_unreachable_hub_names_the_local_way_out(hub):
    hub.append(ConnectionError("offline"))
    with pytest.raises(FileNotFoundError, match=r"owner/name.*offline.*\.jsonl"):
        load_rows("owner/name")


@pytest.mark.parametrize(
    ("source", "package"), [("org/set", "datasets"), ("rows.parquet", "pyarrow")]
)
def test_a_missing_package_is_named(source, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}$"):
        load_rows(source)


def test_unknown_split_on_the_hub_is_a_value_error(hub):
    hub.append(ValueError("Unknown split"))
    with pytest.raises(ValueError, match="split dev: Unknown split"):
        load_rows("owner/name", split="dev")


def test_fingerprint_depends_on_content_and_order_only(tmp_path):
    shuffled_keys = [dict(reversed(row.items())) for row in ROWS]
    assert fingerprint(ROWS) == fingerprint(shuffled_keys)
    assert fingerprint(ROWS) == fingerprint(load_rows(write(tmp_path, "a.jsonl", LINES)))
    assert fingerprint(ROWS) != fingerprint(ROWS[::-1])
    assert fingerprint(ROWS) != fingerprint(ROWS[:2])
    assert fingerprint([{"a": "1"}]) != fingerprint([{"a": 1}])
    assert fingerprint([{"text": "\ud800"}]).startswith("sha256:")


def test_fingerprint_is_sha256_of_canonical_lines():
    line = b'{"a":[1,null],"b":"\\u00fc"}\n'
    wanted = "sha256:" + hashlib.sha256(line).hexdigest()
    assert fingerprint([{"b": "ü", "a": [1, None]}]) == wanted


def test_a_split_is_a_seeded_partition():
    train, held_out = split_indices(10, 0.3, seed=7)
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(train + held_out) == list(range(10))
    assert split_indices(10, 3, seed=7) == (train, held_out)
    for same in (np.float32(0.3), np.float64(0.3), np.int64(3)):
        assert split_indices(10, same, seed=7) == (train, held_out)
    assert split_indices(10, 3, seed=8) != (train, held_out)


@pytest.mark.parametrize("held_out", [0, 10, 11, -1, 0.0, 1.0, -0.5, 0.01, 0.99, True, "3", None])
def test_a_split_leaves_no_side_empty(held_out):
    with pytest.raises(ValueError, match="held_out must"):
        split_indices(10, held_out, seed=0)


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "response": "a", "text": "rendered already"},
        {"question": "q", "answer": "a", "id": 7},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER], "prompt": "ignored"},
        {"messages": None, "prompt": "q", "completion": "a"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_forms_that_say_the_same_give_the_same_turns(row):
    assert to_messages(row) == [USER, ANSWER]


def test_input_and_context_join_the_instruction():
    assert to_messages({"instruction": "q", "input": "x", "output": "a"})[0]["content"] == "q\n\nx"
    assert to_messages({"question": "q", "context": "x", "answer": "a"})[0]["content"] == "q\n\nx"
    assert to_messages({"instruction": None, "input": "x", "output": "a"})[0]["content"] == "x"


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_system_field_opens_the_conversation(name):
    system = {"role": "system", "content": "be kind"}
    assert to_messages({name: "be kind", "question": "q", "answer": "a"})[0] == system
    assert to_messages({name: "be kind", "messages": [system, ANSWER]}) == [system, ANSWER]
    assert to_messages({name: None, "question": "q", "answer": "a"}) == [USER, ANSWER]


def test_assistant_turn_in_a_prompt_is_context():
    row = {"prompt": [USER, ANSWER, USER], "completion": "a"}
    assert [m.get("weight") for m in to_messages(row)] == [None, 0, None, None]
    assert row["prompt"][1] == ANSWER


@pytest.mark.parametrize("answer", [None, float("nan"), ""])
def test_missing_answer_reads_as_empty(answer):
    assert to_messages({"question": "q", "answer": answer})[-1]["content"] == ""
    assert to_messages({"question": "q"}) == [USER]


def test_number_reads_as_text():
    assert to_messages({"question": "q", "answer": 4})[-1]["content"] == "4"


def test_plain_text_is_its_own_role():
    assert to_messages({"text": "once"}) == [{"role": "text", "content": "once"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x", "label": 1}, "fields found: body, label; understood: instruction"),
        ({}, "fields found: none"),
        ({"question": "q", "answer": True}, "answer must be text, got bool"),
        ({"question": "q", "answer": {"text": "a"}}, "answer must be text, got dict"),
        ({"messages": "hi"}, "messages must be a list of messages, got str"),
        ({"messages": ["hi"]}, "messages must hold messages"),
        ({"messages": [{"content": "hi"}]}, "must have a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "text parts"),
    ],
)
def test_row_of_no_known_form_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        to_messages(row)

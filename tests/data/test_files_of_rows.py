"""Files of rows: read as far as asked; whatever is wrong is an error that names the file."""

import csv
import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ila.data import encode, row_encoder
from ila.data.messages import to_messages
from ila.data.rows import load_rows

ROWS = [
    {"question": "Gr\u00f6\u00dfe?", "answer": "drei", "n": 1},
    {"question": "2 + 2", "answer": "4", "n": 2},
    {"question": "\u2028 \U0001f642", "answer": 'ja, "so"\nviele', "n": 3},
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def written(folder: Path, suffix: str) -> Path:
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
        return folder / "rows.parquet"
    if suffix == "csv":
        lines = [["question", "answer"], *([r["question"], r["answer"]] for r in ROWS)]
        quoted = ([f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in line] for line in lines)
        return write(folder, "rows.csv", "\n".join(map(",".join, quoted)))
    if suffix == "jsonl":
        return write(
            folder, "rows.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)
        )
    return write(folder, "rows.json", json.dumps(ROWS))


# -- only what is asked for


@pytest.mark.parametrize(
    ("name", "row", "broken"),
    [
        ("rows.jsonl", '{"text": "a"}\n', b"\xff no JSON\n"),
        ("rows.json", '{"text": "a"}\n', b"\xff no JSON\n"),
        ("rows.csv", "a\n", b'"\xff, no CSV'),
    ],
)
def test_a_limit_reads_no_further(tmp_path, name, row, broken):
    head = "text\n" if name.endswith("csv") else ""
    path = write(tmp_path, name, (head + row * 50_000).encode() + broken)
    assert load_rows(path, limit=10) == [{"text": "a"}] * 10
    with pytest.raises(ValueError, match=r"line 5000[12]: not UTF-8"):
        load_rows(path)


def test_a_limit_of_a_large_file_takes_little_memory(tmp_path):
    import tracemalloc

    path = write(tmp_path, "rows.jsonl", json.dumps({"text": "a" * 100}) + "\n")
    with path.open("ab") as file:
        file.write((json.dumps({"text": "b" * 100}) + "\n").encode() * 200_000)
    tracemalloc.start()
    load_rows(path, limit=10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 20 * 2**20 > 20 * peak


# -- tables written as objects


@pytest.mark.parametrize(
    "content",
    [
        {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]},
        {name: {str(9 - i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
    ],
)
def test_an_object_of_columns_is_its_rows(tmp_path, content):
    assert load_rows(write(tmp_path, "rows.json", json.dumps(content))) == ROWS


def test_columns_of_conversations_are_rows():
    from ila.data.tables import rows_of_columns

    turns = [[{"role": "user", "content": "q"}], [{"role": "user", "content": "r"}]]
    wanted = [{"messages": turn} for turn in turns]
    assert rows_of_columns({"messages": turns}, Path("a.json")) == wanted
    assert rows_of_columns({"messages": {"0": turns[0], "1": turns[1]}}, Path("a")) == wanted


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
        {"question": "q", "answer": "a", "tags": ["x", "y"], "meta": {"a": 1}},
        {"messages": [], "id": 3},
    ],
)
def test_one_row_with_lists_stays_one_row(tmp_path, row):
    assert load_rows(write(tmp_path, "rows.json", json.dumps(row))) == [row]


@pytest.mark.parametrize(
    "content",
    [
        {"question": {"0": "a", "1": "b"}, "answer": {"0": "c"}},
        {"question": {"0": "a", "1": "b"}, "answer": {"0": "c", "2": "d"}},
        {"question": ["a", "b"], "answer": ["c"]},
        {"question": ["a", "b"], "answer": "c"},
    ],
)
def test_columns_of_other_rows_are_refused(tmp_path, content):
    path = write(tmp_path, "rows.json", json.dumps(content))
    with pytest.raises(ValueError, match="'question' reads like a column of 2 rows") as caught:
        load_rows(path)
    assert str(path) in str(caught.value)


def test_nulls_that_a_table_fills_in_are_absent(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    calls = [
        {"function": {"name": "look", "arguments": {"city": "Rome"}}},
        {"function": {"name": "count", "arguments": {"seats": 3}}},
    ]
    rows = [
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet") == rows
    said = [to_messages(row)[0]["tool_calls"][0]["function"] for row in rows]
    assert said == [call["function"] for call in calls]


def test_a_long_field_of_a_csv_is_read_and_the_limit_is_left_alone(tmp_path):
    usual, long = csv.field_size_limit(), "x" * 200_000
    assert load_rows(write(tmp_path, "rows.csv", f"text\n{long}\n{long}"), limit=1) == [
        {"text": long}
    ]
    assert csv.field_size_limit() == usual


# -- errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"n": ' + "9" * 5000 + "}", "line 2: .*integer string"),
        ("b.jsonl", "[" * 100_000, "line 1: .*RecursionError"),
        ("c.json", "[" * 100_000, "RecursionError"),
        ("d.json", '{"n": ' + "9" * 5000 + "}", "integer string"),
        ("f.csv", b"text\na\nb\xff\n", "line 3: not UTF-8"),
        ("g.parquet", b"PAR1" + bytes(20) + b"PAR1", "g.parquet"),
    ],
)
def test_what_a_library_raises_names_the_file(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_a_date_out_of_range_names_the_file(tmp_path, unit):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    far = pyarrow.array([2**40 if unit == "s" else 2**60], pyarrow.int64())
    when = far.cast(pyarrow.timestamp(unit))
    table = pyarrow.table({"text": ["a"], "when": when})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"source .*rows\.parquet: ") as caught:
        load_rows(tmp_path / "rows.parquet")
    assert "\n" not in str(caught.value)
    near = pyarrow.table({"text": ["a"], "when": [datetime.date(2020, 1, 1)]})
    parquet.write_table(near, tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet")[0]["when"].year == 2020


@pytest.mark.parametrize("template", ["none", "plain_chatml"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answer": "b\ud800"},
        {"text": "\udfff"},
        {
            "messages": [
                {"role": "user", "content": "\ud800"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_row(build, template, row):
    rows = [{"text": "a"}, json.loads(json.dumps(row))]
    with pytest.raises(
        ValueError, match=r"row 2: character \d+ of its text is half of a surrogate"
    ):
        encode(rows, build(template), progress=False)


@pytest.mark.parametrize("template", ["none", "plain_chatml"])
def test_a_text_longer_than_a_tokenizer_takes_is_cut_or_refused(build, template, monkeypatch):
    monkeypatch.setattr(row_encoder, "_LONGEST_TEXT", 3000)
    row = {"question": "q", "answer": "many seats " * 2000}
    (cut,), summary = encode([row], build(template), max_length=100, progress=False)
    assert (len(cut["input_ids"]), summary.truncated) == (100, 1)
    with pytest.raises(ValueError, match=r"row 1: .*longer than 3,000 characters.*split the row"):
        encode([row], build(template), max_length=10_000, progress=False)


def damaged(raw: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    for kind, place, value in edits:
        at = int(place * len(raw))
        if kind == "cut":
            raw = raw[:at]
        elif kind == "flip":
            raw = raw[:at] + bytes([value]) + raw[at + 1 :]
        elif kind == "repeat":
            raw = raw[:at] + raw[at : at + 20] * 3 + raw[at + 20 :]
        elif kind == "number":
            raw = raw[:at] + b"9" * (20 * value) + raw[at:]
        else:
            raw = raw.decode("latin-1").encode("utf-16" if value % 2 else "utf-8")
    return raw


EDITS = st.tuples(
    st.sampled_from(["cut", "flip", "repeat", "number", "recode"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@given(edits=st.lists(EDITS, min_size=1, max_size=3))
def test_a_damaged_file_gives_rows_or_one_error_that_names_it(tmp_path, build, suffix, edits):
    path = written(tmp_path, suffix)
    path.write_bytes(damaged(path.read_bytes(), edits))
    try:
        rows = load_rows(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    try:
        encode(rows, build(), progress=False)
    except ValueError as error:
        assert str(error).startswith(("row ", "all "))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_an_undamaged_file_is_read(tmp_path, suffix):
    rows = load_rows(written(tmp_path, suffix))
    assert [row["answer"] for row in rows] == [row["answer"] for row in ROWS]

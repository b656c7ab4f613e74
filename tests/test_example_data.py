"""The example sets: what they teach is right, and the script makes them byte by byte."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ila.data.rows import load_rows, to_messages

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "data"
NAMES = ("arithmetic", "polite", "extraction")
STEP = re.compile(r".+: (\d+) ([-+*/]) (\d+) = (\d+)\.")


def rows_of(name):
    return load_rows(FOLDER / f"{name}.jsonl")


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("example_data_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_makes_the_files_byte_by_byte(make):
    for name, text in make.contents().items():
        assert (FOLDER / name).read_bytes() == text.encode("utf-8"), name


def test_check_fails_on_a_changed_file(tmp_path):
    def check():
        command = [sys.executable, str(tmp_path / "make.py"), "--check"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    for path in FOLDER.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    assert check().returncode == 0
    with (tmp_path / "polite.jsonl").open("ab") as file:
        file.write(b"\n")
    result = check()
    assert result.returncode == 1
    assert "polite.jsonl differs" in result.stderr
    (tmp_path / "polite.jsonl").unlink()
    assert check().returncode == 1


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_distinct_and_short(name):
    turns = [to_messages(row) for row in rows_of(name)]
    assert len(turns) >= 240
    assert all([turn["role"] for turn in one] == ["user", "assistant"] for one in turns)
    assert len({one[0]["content"] for one in turns}) == len(turns)
    assert len({one[1]["content"] for one in turns}) > 0.8 * len(turns)
    for one in turns:
        assert 25 <= len(one[1]["content"]) <= 320
        # A placeholder that was never filled in.
        assert not re.search(r"\{[a-z]*\}", one[0]["content"])


def test_arithmetic_is_right_line_by_line(make):
    for row in rows_of("arithmetic"):
        *steps, last = row["answer"].split("\n")
        known = set(re.findall(r"\d+", row["question"]))
        assert len(steps) >= 2
        for step in steps:
            left, sign, right, result = STEP.fullmatch(step).groups()
            assert {left, right} <= known, row
            value = {"+": "__add__", "-": "__sub__", "*": "__mul__", "/": "__truediv__"}[sign]
            assert getattr(float(left), value)(float(right)) == int(result) > 0, row
            known.add(result)
        assert last == f"Answer: {result}"


def test_polite_replies_keep_the_house_style():
    rows = rows_of("polite")
    for row in rows:
        message, reply = f"{row['instruction']} {row['input']}", row["output"]
        name = re.fullmatch(r"Dear (\w+),\nThank you for writing .*", reply.split(".")[0] + ".")
        assert name and f"{name[1]}, order" in message, row
        item = re.search(r"about your ([a-z ]+)\.", reply)
        assert item and item[1] in message, row
        assert reply.endswith("\nWith kind regards,\nFernleaf Support")
    assert 30 < sum(not row["input"] for row in rows) < 100


def test_extraction_holds_what_the_text_says():
    for row in rows_of("extraction"):
        task, text = row["prompt"].split("\n\n")
        record = json.loads(row["completion"])
        assert row["completion"] == json.dumps(record, separators=(",", ":"))
        assert len(record) >= 4
        for field, value in record.items():
            assert re.search(rf"\b{field}\b", task), row
            assert re.search(rf"\b{re.escape(str(value))}\b", text), row


def test_readme_tells_the_true_number_of_rows():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        line = next(line for line in readme.splitlines() if f"`{name}.jsonl`" in line)
        assert f"| {len(rows_of(name))} |" in line

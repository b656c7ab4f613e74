"""Laws of output folders: one run owns one, and what it did not make is left alone."""

import json

import pytest

from ila.runs.folder import check, claim, read

MINE = {"what": "train", "inputs": {"rank": 8, "seed": 0}, "open": ["a", "b"]}


def mark(folder, description=MINE, resume=False, **options):
    claim(folder, description, marker="run.json", resume=resume, **options)


def test_a_free_folder_is_made_and_marked(tmp_path):
    for folder in (tmp_path / "new" / "one", tmp_path):
        assert not check(folder, MINE, marker="run.json", resume=False)
    mark(tmp_path / "new" / "one", also={"versions": {"torch": "2"}})
    assert read(tmp_path / "new" / "one", "run.json") == MINE | {"versions": {"torch": "2"}}


def test_checking_leaves_no_trace(tmp_path):
    check(tmp_path / "new", MINE, marker="run.json", resume=True)
    assert not list(tmp_path.iterdir())


def test_the_same_run_is_resumed_and_only_when_asked(tmp_path):
    mark(tmp_path, also={"versions": 1})
    before = (tmp_path / "run.json").read_bytes()
    mark(tmp_path, resume=True, also={"versions": 2})
    assert (tmp_path / "run.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"holds a run already; give another folder, or go on"):
        mark(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"what": "learn"}, "what"),
        ({"inputs": {"rank": 4, "seed": 1}}, "inputs.rank, inputs.seed"),
        ({"inputs": {"rank": 8, "seed": 0, "new": 1}}, "inputs.new"),
        ({"inputs": {"rank": 8}}, "inputs.seed"),
        ({"open": ["a"]}, "open"),
        ({"more": 1}, "more"),
    ],
)
def test_another_run_is_refused_by_what_differs(change, named, tmp_path):
    mark(tmp_path)
    with pytest.raises(ValueError, match=f"differs in {named}; ask your neighbour$"):
        mark(tmp_path, MINE | change, resume=True, remedy="ask your neighbour")


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_no_run_is_left_alone(resume, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="is not the folder of a run and was left alone"):
            mark(folder, resume=resume)
    mark(tmp_path, beside=("thesis.txt",))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_a_killed_writer_left_does_not_make_a_folder_taken(tmp_path):
    (tmp_path / ".ila-tmp-0123").write_text("{")
    mark(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "must hold an object"), ("\xff", "not JSON")],
)
def test_a_damaged_marker_is_refused(text, message, tmp_path):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        mark(tmp_path, resume=True)


def test_a_marker_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no run\.json"):
        read(tmp_path, "run.json")


def test_descriptions_are_compared_as_json(tmp_path):
    mark(tmp_path, {"config": {"points": (1, 2)}})
    mark(tmp_path, {"config": {"points": (1, 2)}}, resume=True)
    assert json.loads((tmp_path / "run.json").read_text()) == {"config": {"points": [1, 2]}}

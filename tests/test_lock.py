"""Laws of the lock on a folder: one owner at a time, however the one before it ended."""

import os
import signal
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest

from ila.runs.folder import claim
from ila.runs.lock import LOCK_FILE, owned

REPOSITORY = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from ila.runs.lock import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(600)
"""


def compete(root, rounds, gate, answers):
    """Claim a new folder in each round, when the other process does, and keep it to the end."""
    for turn in range(rounds):
        gate.wait(60)
        try:
            with owned(root / str(turn)):
                claim(root / str(turn), {"what": "x"}, marker="run.json", resume=False)
                gate.wait(60)
            answers.put((turn, True))
        except ValueError:
            gate.wait(60)
            answers.put((turn, False))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_of_two_that_claim_at_once_one_is_refused_each_time(tmp_path):
    context, rounds = get_context("fork"), 60
    gate, answers = context.Barrier(2), context.Queue()
    both = [
        context.Process(target=compete, args=(tmp_path, rounds, gate, answers)) for _ in range(2)
    ]
    for process in both:
        process.start()
    found = [answers.get(timeout=120) for _ in range(2 * rounds)]
    for process in both:
        process.join(60)
    won = [turn for turn, is_owner in found if is_owner]
    assert sorted(won) == list(range(rounds))
    assert not list(tmp_path.rglob(LOCK_FILE))


@pytest.fixture
def holder(tmp_path):
    """Start a process that owns tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"owned\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_of_a_killed_process_keeps_no_one_out(tmp_path, holder):
    with (
        pytest.raises(ValueError, match="is being written by another process"),
        owned(tmp_path / "run"),
    ):
        pytest.fail("two owners")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with owned(tmp_path / "run"):
        claim(tmp_path / "run", {"a": 1}, marker="run.json", resume=False)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]


def test_blocks_of_one_thread_are_nested_and_another_thread_is_refused(tmp_path):
    said = []

    def other():
        try:
            with owned(tmp_path):
                said.append("owned")
        except ValueError as error:
            said.append(str(error))

    with owned(tmp_path), owned(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and "by another process" in said[0]
    other()
    assert said[1] == "owned"


def test_an_error_leaves_no_folder_and_no_lock(tmp_path):
    with pytest.raises(KeyError), owned(tmp_path / "new" / "run"):
        raise KeyError("a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(KeyError), owned(tmp_path):
        raise KeyError("a")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_killed_writers_left_goes_and_nothing_else(tmp_path):
    for name in (".ila-tmp-0123456789abcdef", "adapter.replaced-0123abcd", ".adapter-x1_y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("half")
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / ".ila-tmp-00").write_text("half")
    kept = ("notes.replaced-by-me", ".ila-tmpx", "adapter")
    for name in kept:
        (tmp_path / name).write_text("whole")
    with owned(tmp_path):
        pass
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == set(kept)

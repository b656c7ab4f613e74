"""The command in this process: its exit code, what it said, and what it left in a folder."""

import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ila import cli

# What a stage took, in cost.json and in a mask.
SECONDS = re.compile(rb'("seconds":) [0-9.e+-]+')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Take the CPU, one thread and a short garbage collection; see the tests of the search."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


class Answer(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the one line that says what the user did wrong."""
        assert self.code == 2, self
        (line,) = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert "Traceback" not in self.err and self.err.rstrip().endswith(line)
        return line


@pytest.fixture
def ila(monkeypatch, capsys) -> Callable[..., Answer]:
    """Return a runner of `ila ...` through the entry point, as the shell calls it."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["ila", *map(str, arguments)])
        monkeypatch.setattr(cli, "screen", cli.Console(width=200, markup=False))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


def write_rows(path: Path, count: int = 12) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {"prompt": " ".join(letters[i : i + 3]), "completion": " ".join(letters[i + 3 : i + 8])}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Return a file of twelve rows."""
    return write_rows(tmp_path_factory.mktemp("data") / "letters.jsonl")


@pytest.fixture
def source(tiny_model_folder, data) -> tuple[str, ...]:
    """Return the options that say what to read."""
    return ("--model", str(tiny_model_folder), "--data", str(data), "--rank", "2")


LEARN = (
    *("--method", "ila", "--stage1-steps", "4", "--stage2-steps", "5"),
    *("--batch-size", "2", "--save-every", "2"),
)
TRAIN = ("--steps", "4", "--batch-size", "2", "--save-every", "2", "--learning-rate", "0.01")


@pytest.fixture
def learn(ila, source) -> Callable[..., Answer]:
    """Return `ila learn` of a few steps; later options win."""
    return lambda out, *more: ila("learn", *source, *LEARN, "--out", out, *more)


@pytest.fixture
def train(ila, source) -> Callable[..., Answer]:
    """Return `ila train` of a few steps; later options win."""
    return lambda out, *more: ila("train", *source, *TRAIN, "--out", out, *more)


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Return a reader of every file in a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {
            path.relative_to(folder).as_posix(): SECONDS.sub(rb"\1 0", path.read_bytes())
            for path in files
        }

    return read

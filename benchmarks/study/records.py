"""One JSON line for each finished cell of a study, appended and flushed to the disk.

A cell is a kind and a key, its full configuration. A line that a kill cut off is removed when the
file is opened again, so its cell is done again; any other line that cannot be read is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ila.runs.processes import on_main_process, processes


def digest(key: Mapping[str, Any]) -> str:
    """A short name of a configuration.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(key, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Records:
    """The lines of one file; every process holds all of them, the main one writes.

    Args:
        path: File, made if it is not there. One study at a time writes to it.

    Raises:
        BlockingIOError: Another process writes to it.
        ValueError: A line before the last is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: TextIO | None = None
        lines = on_main_process(self._open)
        self.lines = {digest({"kind": line["kind"], **line["key"]}): line for line in lines}

    def _open(self) -> list[dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return self._read()
        except BaseException:
            self.file.close()
            raise

    def _read(self) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        lines = []
        for number, line in enumerate(data[:whole].decode("utf-8").splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number} is no JSON: {error}") from error
        return lines

    def get(self, kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a cell; None if it is not finished."""
        line = self.lines.get(digest({"kind": kind, **key}))
        return None if line is None else line["result"]

    def add(self, kind: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Append the result of a cell; it is on the disk when this returns."""
        line = {"kind": kind, "key": dict(key), "result": dict(result)}
        text = json.dumps(line, allow_nan=False)
        on_main_process(lambda: self._append(text))
        self.lines[digest({"kind": kind, **key})] = json.loads(text)
        return dict(result)

    def _append(self, text: str) -> None:
        self.file.write(text + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def of(self, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(key, result) of every finished cell of a kind."""
        lines = (line for line in self.lines.values() if line["kind"] == kind)
        return ((line["key"], line["result"]) for line in lines)

    def close(self) -> None:
        """Let another study write."""
        if self.file is not None and processes().is_main_process:
            self.file.close()

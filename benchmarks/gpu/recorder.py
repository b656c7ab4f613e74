"""A plugin of pytest that keeps the outcomes of tests in a file while they run.

    pytest -p benchmarks.gpu.recorder --record FILE

The file may hold other entries already. It is written at most once a second, and at the end. No
import of torch here: pytest loads it first, and rewrites the asserts of what is imported later.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from ila.runs.atomic import write_json_atomic


class Recorder:
    """The outcomes so far, by test."""

    def __init__(self, file: Path):
        self.file, self.outcomes, self.at = file, {}, 0.0
        self.others = json.loads(file.read_text("utf-8")) if file.exists() else {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            if time.monotonic() - self.at > 1.0:
                self.write(finished=False)

    def pytest_sessionfinish(self) -> None:
        self.write(finished=True)

    def write(self, finished: bool) -> None:
        self.at = time.monotonic()
        wrong = [name for name, outcome in self.outcomes.items() if outcome == "failed"]
        counts = dict(Counter(self.outcomes.values()))
        found = {"finished": finished, "counts": counts, "failed": wrong}
        write_json_atomic(self.file, self.others | found)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="file of the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config.getoption("--record")))

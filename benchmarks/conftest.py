"""Options of ``pytest benchmarks``, gates before measurements, and the files that come of it.

pytest-benchmark repeats one function and then the next, and its calibration cannot be shared by
two; comparing two needs interleaved rounds. So the rounds are run by ``harness.timing`` and their
times are replayed to pytest-benchmark on a clock of ours: its table, its JSON and its comparison of
two runs show what the interleaved rounds found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before transformers is imported: no network unless asked for by a hub id.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait by spinning slow each other down when something else uses the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from benchmarks.harness.gate import GateRedError
from benchmarks.harness.session import Cell, Options, Session
from benchmarks.harness.timing import CLOCKS

SESSION = pytest.StashKey[Session]()
REPOSITORY = Path(__file__).resolve().parent.parent
ARITHMETIC = REPOSITORY / "examples" / "data" / "arithmetic.jsonl"
# What `path` learned on GSM8K in the study, seed 0: for the demo's model.
LEARNED = Path(__file__).parent / "masks" / "smollm2-gsm8k.json"


_NOW = [0.0]


def replayed() -> float:
    """A clock that stands still but for the recorded times."""
    return _NOW[0]


def _pass(seconds: Iterator[float]) -> None:
    _NOW[0] += next(seconds)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ila benchmarks")
    size = group.addoption
    size("--full", dest="ila_size", action="store_const", const="full", help="every cell")
    size(
        "--smoke",
        dest="ila_size",
        action="store_const",
        const="smoke",
        help="a few tiny cells, to try the harness; says nothing about speed",
    )
    group.addoption("--results", type=Path, help="folder for the JSON files (.benchmarks)")
    group.addoption("--model", help="folder, hub id or GGUF file (the demo's SmolLM2-135M)")
    group.addoption("--data", type=Path, help="instruction rows (examples/data/arithmetic.jsonl)")
    group.addoption("--mask", type=Path, help="a mask of the model, from `ila learn` (of SmolLM2)")
    group.addoption("--clock", choices=list(CLOCKS), default="wall", help="on a CPU")
    group.addoption("--attention", help="transformers' name, for every model (the model's own)")
    group.addoption("--batch", metavar="ROWSxTOKENS", help="of test_model.py alone")
    group.addoption("--rounds", type=int, help="interleaved rounds of every cell")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gate: correctness, checked before anything is measured")
    given = config.getoption
    options = Options(
        size=given("ila_size") or "quick",
        clock=given("clock"),
        attention=given("attention"),
        rounds=given("rounds"),
        model=given("model"),
        data=given("data") or ARITHMETIC,
        mask=given("mask") or (LEARNED if given("model") is None else None),
        batch=None if given("batch") is None else _batch(given("batch")),
        scratch=config.rootpath / ".benchmarks",
    )
    results = given("results") or options.scratch
    config.stash[SESSION] = Session(options, results)


def _batch(text: str) -> tuple[int, int]:
    """Rows and tokens of ``"4x256"``."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise pytest.UsageError(f"--batch must be ROWSxTOKENS, such as 4x256; got {text!r}")
    return int(parts[0]), int(parts[1])


def _cells(metafunc: pytest.Metafunc) -> tuple[str, list[Cell]]:
    """Name of the result file and the cells of a test module, made once."""
    session, module = metafunc.config.stash[SESSION], metafunc.module
    if session.options.batch is not None and module.RESULT != "model":
        raise pytest.UsageError("--batch is an option of benchmarks/test_model.py alone")
    if module.RESULT not in session.files:
        session.files[module.RESULT] = list(module.cells(session.options))
    return module.RESULT, session.files[module.RESULT]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    file, cells = _cells(metafunc)
    if "contestant" not in metafunc.fixturenames:
        ids = [f"{file}: {cell.name}" for cell in cells]
        metafunc.parametrize("cell", cells, ids=ids)
        return
    pairs = [(cell, name) for cell in cells for name in cell.contestants]
    ids = [f"{file}: {cell.name}: {name}" for cell, name in pairs]
    metafunc.parametrize(("cell", "contestant"), pairs, ids=ids)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All gates first: a wrong result is found before minutes are spent on measuring."""
    items.sort(key=lambda item: item.get_closest_marker("gate") is None)
    for item in items:
        if "show" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=replayed))


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(GateRedError):
        item.session.shouldfail = "a correctness gate is red: nothing is reported or written"
    return report


@pytest.fixture
def show(session: Session, request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """Give the times of a contestant to pytest-benchmark; the cell is measured if it was not."""

    def shown(file: str, cell: Cell, contestant: str) -> None:
        session.measure(file, cell)
        seconds = session.seconds[id(cell)][contestant]
        rows = [r for r in session.rows[id(cell)] if r.get("contestant") == contestant]
        benchmark.group = f"{file}: {cell.name}"
        benchmark.name = contestant
        benchmark.extra_info["rows"] = rows
        benchmark.pedantic(_pass, args=(iter([*seconds, 0.0]),), rounds=len(seconds))

    return shown


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what is complete; a red gate, or a cell that failed or was left out, writes nothing."""
    if not session.config.option.collectonly:
        session.config.stash[SESSION].write()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ours, say = config.stash[SESSION], terminalreporter.write_line
    if ours.red:
        terminalreporter.section("NOT MEASURED: a correctness gate is red", red=True)
        for message in ours.red:
            say(message)
        return
    for file in ours.files:
        if file not in ours.busy:
            continue
        busy = ours.busy[file].as_dict()
        if busy["busy"]:
            say(f"{file}: THE MACHINE WAS BUSY: {'; '.join(busy['why'])}", red=True)
        else:
            say(f"{file}: the machine was quiet (calibration spread {busy['spread']:.2f})")
        if not ours.is_complete(file):
            say(f"{file}.json not written: not every cell was measured")
    for path in ours.written:
        say(f"written: {path}")

"""What each step of a day with a GPU does; its file is written whole each time there is more."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import models
from benchmarks.harness.busy import Busy
from benchmarks.harness.session import Cell, Options, Session, environment
from benchmarks.layer.cell import LayerCell
from benchmarks.layer.shapes import WIDTHS
from ila.runs.atomic import write_json_atomic
from ila_kernels import Tuned, prefer, tune
from ila_kernels.choice import gemm_form
from ila_kernels.tuning import Shape

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("Llama-3-8B", "Qwen3-8B")
TOKENS, FEW, RANK = 8192, 2048, 16


def options(rounds: int | None = None) -> Options:
    """Options of the timed steps."""
    return Options(size="full", rounds=rounds, data=Path("random tokens"))


# --- self-check


def self_check(results: Path, device: torch.device) -> int:
    """Check every form of the kernels on tiny problems against fp64."""
    from ila_kernels.kernels import selfcheck

    found: dict[str, object] = {}
    for form in ("pointer", "persistent"):
        begin, fault = time.monotonic(), None
        try:
            with gemm_form(form) if form == "persistent" else nullcontext():
                selfcheck.check(device)
        except Exception as error:  # compilers and drivers raise errors of any class
            fault = said(error)
        found[form] = {"right": fault is None, "why": fault, "seconds": time.monotonic() - begin}
        write(results, "selfcheck", device, {"forms": found})
    return int(not all(form["right"] for form in found.values()))


# --- tests


class Recorder:
    """A plugin of pytest that writes the outcomes known so far, at most once a second."""

    def __init__(self, save: Callable[[dict[str, object]], None]):
        self.save, self.outcomes, self.at = save, {}, 0.0

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
        counts = Counter(self.outcomes.values())
        self.save({"finished": finished, "counts": dict(counts), "failed": wrong})


def run_tests(
    results: Path, device: torch.device, paths: Sequence[str] = (str(ROOT / "tests/kernels"),)
) -> int:
    """Run the tests marked ``gpu``, all of which are of the kernels."""
    recorder = Recorder(lambda found: write(results, "tests", device, found))
    arguments = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    return int(pytest.main([*arguments, *paths], plugins=[recorder]))


# --- what wins


def tuned_shapes() -> list[tuple[Shape, int]]:
    """Layers of one x with their rows: the costliest first, then fewer rows, each kind once."""
    found: list[tuple[Shape, int]] = []
    for rows in (TOKENS, FEW):
        for model in MODELS:
            hidden, kv, mlp = WIDTHS[model]
            groups = [(hidden, (mlp, mlp)), (mlp, (hidden,)), (hidden, (hidden, kv, kv))]
            found += [(group, rows) for group in (*groups, (hidden, (hidden,)))]
    return list(dict.fromkeys(found))


def choose(
    results: Path,
    device: torch.device,
    shapes: Iterable[tuple[Shape, int]] | None = None,
    measure: Callable[..., Tuned] = tune,
    **more: Any,
) -> int:
    """Time every implementation of the op by shape; keep verdicts as rows of ``MEASURED``.

    Returns:
        1 if a kind of call could not be measured at all, or a candidate gave wrong results.
    """
    verdicts, skipped = [], {}
    for shape, rows in tuned_shapes() if shapes is None else shapes:
        tuned = measure([shape], rows=(rows,), rank=RANK, device=device, **more)
        verdicts += tuned.verdicts
        skipped |= tuned.skipped
        print(tuned, flush=True)
        content = {
            "verdicts": [verdict.to_json() for verdict in verdicts],
            "rows": [repr(verdict) for verdict in verdicts],
            "skipped": skipped,
        }
        write(results, "choice", device, content)
    wrong = [why for v in verdicts for why in v.left_out.values() if "wrong results" in why]
    return int(bool(skipped or wrong))


# --- by how much


def layer_cells(options: Options) -> list[LayerCell]:
    """Layers of both models; a kernel that is wrong here is left out by name."""
    names = ("gate up", "q k v", "down", "up", "q")

    def cell(model: str, layers: str, m: int) -> LayerCell:
        return LayerCell(options, model, layers, m, RANK, strict=False)

    large = [cell(model, name, TOKENS) for model in MODELS for name in names]
    return large + [cell(MODELS[0], name, FEW) for name in names]


def measure_cells(file: str, cells: Iterable[Cell], options: Options, results: Path) -> int:
    """Check and measure cells one by one; those that are done are a whole file each time.

    Returns:
        1 if a cell failed, or left out one of our own contestants as wrong.
    """
    session, faults = Session(options, results, {file: []}), 0
    session.busy[file] = Busy(options.device, session.load_before)
    for cell in cells:
        try:
            cell.check()
            session.green.add(id(cell))
            session.measure(file, cell)
        except Exception as error:  # a wrong result, or too little memory: the next cell may fit
            print(f"{cell.name}: {said(error)}", flush=True)
            faults += 1
            continue
        finally:
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
        left_out = cell.conditions().get("left_out", {})
        faults += any(name.startswith("ours") for name in left_out)
        session.files[file] = [*session.files[file], cell]
        session.write()
        print(f"{cell.name}: measured", flush=True)
    return int(faults > 0)


def layers(results: Path, device: torch.device) -> int:
    """Measure layers of true shapes."""
    prefer(auto="eager")  # "ours" is one thing, whatever was tuned here
    return measure_cells("layer", layer_cells(options(15)), options(15), results)


def train(results: Path, device: torch.device) -> int:
    """Measure training steps of blocks of true shapes."""
    return measure_cells("model", models.cells(options()), options(), results)


STEPS: Mapping[str, Callable[[Path, torch.device], int]] = {
    "self-check": self_check,
    "tests": run_tests,
    "tune": choose,
    "layers": layers,
    "models": train,
}


def said(error: Exception) -> str:
    """The first line of an error, with its class."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write(results: Path, name: str, device: torch.device, content: Mapping[str, object]) -> None:
    """Write the file of a step."""
    results.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(device), **content}
    write_json_atomic(results / f"{name}-gpu.json", document)

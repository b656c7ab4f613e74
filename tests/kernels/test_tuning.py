"""``tune`` with a scripted clock in place of a GPU's, its files, and what ranks share."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar

import platformdirs
import pytest
import torch

import ila_kernels
from ila_kernels import choice, device, measuring, paths, prefer, store, tune, tuning, use_verdicts
from ila_kernels.choice import Call, gpu_impl
from ila_kernels.verdict import CANDIDATES, Cell, Machine, Verdict

MACHINE = Machine("a GPU", "12080", "12.8", "2.13.0", "3.9.0", "0.1")
CELL = Cell(2048, 64, (32,), 16, "bfloat16", "float32", False)
CALL = Call(2048, 64, (32,), 16, "bfloat16", "float32", False, "a GPU")


class FakeProblem:
    """Results that are right, unless a candidate is scripted to fail."""

    faults: ClassVar[dict[str, Exception]] = {}
    wrong: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, cell, dropout_p, device):
        self.dropout_p = dropout_p

    def step(self, impl):
        if impl in self.faults:
            raise self.faults[impl]
        return [torch.full((4,), 2.0 if impl in self.wrong else 1.0)]

    def refuse_pointers(self):
        if "pointers" in self.faults:
            raise self.faults["pointers"]


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, whose cache is empty."""
    monkeypatch.setattr(FakeProblem, "faults", {})
    monkeypatch.setattr(FakeProblem, "wrong", frozenset())
    monkeypatch.setattr(measuring, "Problem", FakeProblem)
    monkeypatch.setattr(paths, "ensure_checked", lambda impl, device: None)
    for module in (measuring, tuning):
        monkeypatch.setattr(module, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    yield tmp_path / "cache"
    use_verdicts([])


class Clock:
    """Milliseconds by candidate; a list is played in its order."""

    def __init__(self, **ms):
        self.ms = dict.fromkeys(CANDIDATES, 1.0) | ms
        self.calls: list[str] = []

    def __call__(self, step):
        (candidate,) = step.args
        self.calls.append(candidate)
        ms = self.ms[candidate]
        return ms if isinstance(ms, float) else ms[(self.calls.count(candidate) - 1) % len(ms)]


tuned = partial(tune, [(64, 32)], rows=[2048], device="cuda")


def test_the_fastest_is_chosen_kept_and_used(machine):
    result = tuned(timer=Clock(hybrid=0.7, triton=0.9))
    assert gpu_impl(CALL, verdicts=choice.verdicts_in_use())[0] == "hybrid"
    assert result.folder == machine / "verdicts" / MACHINE.digest()
    use_verdicts([])  # as a process does that did not measure
    assert gpu_impl(CALL, verdicts=choice.verdicts_in_use())[0] == "eager"
    assert use_verdicts(device="cuda") == result.verdicts
    assert gpu_impl(CALL, verdicts=choice.verdicts_in_use())[0] == "hybrid"


def test_the_table_says_what_was_measured_and_where_it_is():
    result = tuned(timer=Clock(hybrid=0.7, triton=0.9))
    assert str(result).splitlines() == [
        "64 → 32 at 2048 rows: eager 1, hybrid 0.7, triton 0.9, persistent 1 ms -> hybrid "
        "(faster in 7 of 7 rounds)",
        f"kept in {result.folder}",
    ]


@pytest.mark.parametrize("hybrid", [1.0, 0.98, [0.5] * 4 + [1.0] * 3])
def test_a_tie_stays_with_eager(hybrid):
    assert "-> eager" in str(tuned(timer=Clock(hybrid=hybrid)))


def test_a_preference_is_set_aside_while_measuring():
    seen = []

    def clock(step):
        seen.append(choice.preference())
        return 1.0

    prefer(auto="eager", gemm="persistent")
    try:
        tuned(timer=clock)
        assert set(seen) == {choice.Preference()}
        assert choice.preference() == choice.Preference("eager", "persistent")
    finally:
        prefer()


def test_rounds_are_interleaved_and_rotate():
    clock = Clock()
    tuned(timer=clock)
    rounds = [clock.calls[i : i + 4] for i in range(0, len(clock.calls), 4)]
    assert len(rounds) == 7
    assert all(sorted(r) == sorted(CANDIDATES) for r in rounds)
    assert {r[0] for r in rounds} == set(CANDIDATES)


def test_every_shape_is_measured_at_every_number_of_rows():
    seen = []
    result = tune(
        [(64, 32), (64, (32, 16, 16))],
        rows=[256, 2048],
        device="cuda",
        timer=Clock(),
        progress=lambda *row: seen.append(row),
    )
    assert [v.cell.ns for v in result.verdicts] == [(32,), (32,), (32, 16, 16), (32, 16, 16)]
    assert [v.cell.rows for v in result.verdicts] == [256, 2048] * 2
    assert [row[:2] for row in seen] == [(i, 4) for i in range(4)]
    assert seen[3][2] == "64 → 32 + 16 + 16 at 2048 rows"


def test_an_interrupted_run_keeps_what_it_has():
    calls = []

    def clock(step):
        calls.append(step)
        if len(calls) > 4 * 7:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune([(64, 32), (64, 16)], rows=[2048], device="cuda", timer=clock)
    assert [v.cell.ns for v in use_verdicts(device="cuda")] == [(32,)]


# --- what cannot run


def test_a_candidate_that_fails_is_left_out_and_named(monkeypatch):
    def check(impl, device):
        if impl == "triton":
            raise RuntimeError("the Triton kernels compute wrong results")

    monkeypatch.setattr(paths, "ensure_checked", check)
    FakeProblem.faults = {
        "pointers": RuntimeError("no descriptor of P"),
        "hybrid": ValueError("no"),
    }
    clock = Clock(triton=0.1, persistent=0.1, hybrid=0.1)
    result = tuned(timer=clock)
    assert set(clock.calls) == {"eager"}
    text = str(result)
    assert "-> eager" in text
    assert "without triton: RuntimeError: the Triton kernels compute wrong results" in text
    assert "without persistent: RuntimeError: no descriptor of P" in text
    assert "without hybrid: ValueError: no" in text


def test_wrong_results_are_never_timed():
    FakeProblem.wrong = frozenset({"hybrid"})
    clock = Clock(hybrid=0.1)
    assert "without hybrid: RuntimeError: wrong results, off by 1 of their size" in str(
        tuned(timer=clock)
    )
    assert "hybrid" not in clock.calls


def test_a_call_that_eager_cannot_run_is_skipped():
    FakeProblem.faults = {"eager": RuntimeError("out of memory\ndetails")}
    result = tuned(timer=Clock())
    assert result.verdicts == ()
    assert str(result) == "64 → 32 at 2048 rows: not measured: out of memory"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="PyTorch sees none: nothing was measured"):
        tune([(64, 32)])
    assert use_verdicts() == ()


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(tuning, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        tuned(timer=Clock())


def test_nothing_is_measured_while_a_graph_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    clock = Clock()
    with pytest.raises(RuntimeError, match=r"tune cannot run under torch\.compile"):
        tuned(timer=clock)
    assert clock.calls == [] and choice.verdicts_in_use().all == ()


@pytest.mark.parametrize("wrong", [{"rounds": 6}, {"rank": 0}, {"rows": [0]}])
def test_numbers_are_checked(wrong):
    with pytest.raises(ValueError, match=r"must be (at least 7|positive), got"):
        tuned(timer=Clock(), **wrong)


# --- files


def only_file(machine: Path) -> Path:
    (path,) = (machine / "verdicts" / MACHINE.digest()).iterdir()
    return path


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda text: text[:40], "Expecting|Unterminated|delimiter"),
        (lambda text: "", "Expecting value"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version must be 1, got 2"),
        (lambda text: text.replace("a GPU", "another GPU"), "measured on .*another GPU"),
        (lambda text: text.replace("a GPU", "\udcff"), "utf-8|surrogate|decode"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_miss_with_one_warning(machine, damage, named):
    tuned(timer=Clock(hybrid=0.5))
    path = only_file(machine)
    text = damage(path.read_text(encoding="utf-8"))
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    (path.parent / "another.json").write_text("[]")
    with pytest.warns(
        RuntimeWarning, match=f"2 verdicts in .* count as not measured: .*({named})"
    ) as w:
        assert use_verdicts(device="cuda") == ()
    assert len(w) == 1
    tuned(timer=Clock(hybrid=0.5))
    (path.parent / "another.json").unlink()
    assert len(use_verdicts(device="cuda")) == 1


@pytest.mark.parametrize("field", ["gpu", "driver", "cuda", "torch", "triton", "library"])
def test_another_version_has_not_been_measured(field, monkeypatch):
    import dataclasses

    tuned(timer=Clock(hybrid=0.5))
    other = dataclasses.replace(MACHINE, **{field: "another"})
    monkeypatch.setattr(tuning, "machine_of", lambda device: other)
    assert use_verdicts(device="cuda") == ()


def test_a_cache_that_cannot_be_written_leaves_the_verdicts_in_memory(machine):
    machine.write_text("a file where the folder should be")
    result = tuned(timer=Clock(hybrid=0.5))
    assert result.folder is None
    assert "not kept, for this process only: " in str(result)
    assert gpu_impl(CALL, verdicts=choice.verdicts_in_use())[0] == "hybrid"


def test_a_write_that_fails_leaves_the_file_as_it_was(machine, monkeypatch):
    tuned(timer=Clock(hybrid=0.5))
    before = only_file(machine).read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left" in str(tuned(timer=Clock(hybrid=2.0)))
    assert only_file(machine).read_bytes() == before


WRITER = """
import json, sys
from pathlib import Path
from ila_kernels import store
from ila_kernels.verdict import Verdict
store.folder_of = lambda machine: Path(sys.argv[1])
verdict = Verdict.from_json(json.loads(sys.argv[2]))
for _ in range(50):
    store.save([verdict])
"""


def test_processes_that_write_one_cell_leave_a_whole_file():
    folder, writers = store.folder_of(MACHINE), []
    for ms in (0.5, 0.9):
        rounds = {"eager": (1.0,) * 7, "hybrid": (ms,) * 7}
        data = json.dumps(Verdict(MACHINE, CELL, rounds, "2026-01-31").to_json())
        writers.append(subprocess.Popen([sys.executable, "-c", WRITER, str(folder), data]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that is not whole would be one
        while any(writer.poll() is None for writer in writers):
            assert len(store.load(MACHINE)) <= 1
    assert [writer.wait() for writer in writers] == [0, 0]
    (verdict,) = store.load(MACHINE)
    assert verdict.ms["hybrid"][0] in (0.5, 0.9)
    assert [p.suffix for p in folder.iterdir()] == [".json"]


def test_a_record_of_a_run_is_used_as_it_stands(machine):
    result = tuned(timer=Clock(hybrid=0.5))
    record = json.loads(json.dumps([v.to_json() for v in result.verdicts]))
    tuned(timer=Clock(hybrid=2.0))  # the cache has moved on
    assert use_verdicts(record) == result.verdicts
    assert gpu_impl(CALL, verdicts=choice.verdicts_in_use())[0] == "hybrid"


def test_importing_measures_nothing_and_reads_nothing():
    assert choice.verdicts_in_use().all == ()
    assert ila_kernels.tune is tune


def test_versions_of_this_machine_are_text(monkeypatch):
    monkeypatch.setattr(device, "gpu_name", lambda index: "a GPU")
    machine = device.machine_of(torch.device("cuda", 0))
    assert machine.torch == torch.__version__ and machine.library == ila_kernels.__version__
    assert all(isinstance(value, str) and value for value in vars(machine).values())


# --- ranks

RANKS = textwrap.dedent(
    """
    import json, os, sys, warnings
    from pathlib import Path

    import platformdirs
    import torch
    from torch import distributed

    from ila_kernels import measuring, paths, tuning, use_verdicts
    from ila_kernels.choice import Call, gpu_impl, verdicts_in_use
    from ila_kernels.verdict import Machine

    rank, gpus, folder = int(os.environ["RANK"]), sys.argv[1].split(","), Path(sys.argv[2])
    machine = Machine(gpus[rank], "1", "1", "1", "1", "1")
    measuring.machine_of = tuning.machine_of = lambda device: machine
    paths.ensure_checked = lambda impl, device: None
    platformdirs.user_cache_path = lambda *_, **__: folder / str(rank)


    class Problem:
        def __init__(self, cell, dropout_p, device):
            self.dropout_p = dropout_p

        def step(self, impl):
            return [torch.ones(1)]

        def refuse_pointers(self):
            pass


    measuring.Problem = Problem
    distributed.init_process_group("gloo")
    # The main process finds the hybrid faster, the other would find it slower.
    ms = {"hybrid": 0.5 if rank == 0 else 2.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = tuning.tune(
            [(64, 32)], rows=[256], device="cuda", timer=lambda step: ms.get(step.args[0], 1.0)
        )
        again = use_verdicts(device="cuda")
    call = Call(256, 64, (32,), 16, "bfloat16", "float32", False, gpus[rank])
    print(json.dumps({
        "impl": gpu_impl(call, verdicts=verdicts_in_use())[0],
        "table": str(tuned),
        "again": len(again),
        "wrote": (folder / str(rank)).exists(),
        "warned": [str(w.message) for w in caught],
    }))


    def fails(step):
        raise ValueError("a clock that stopped")


    try:
        tuning.tune([(64, 32)], rows=[256], device="cuda", timer=fails)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    distributed.destroy_process_group()
    """
)


@pytest.mark.parametrize(("gpus", "second"), [("a,a", "hybrid"), ("a,b", "eager")])
def test_the_main_process_measures_for_all(run_ranks, tmp_path, gpus, second):
    texts = run_ranks(RANKS, gpus, tmp_path, timeout=120)
    main, other = (json.loads(next(x for x in t.splitlines() if x[:1] == "{")) for t in texts)
    assert main["impl"] == "hybrid" and other["impl"] == second
    assert main["table"] == other["table"]
    assert main["wrote"] and not other["wrote"]
    assert main["warned"] == []
    assert main["again"] == 1
    if second == "eager":
        assert all("impl='auto' takes library GEMMs" in w for w in other["warned"])
        assert len(other["warned"]) == 2
    assert "ValueError: a clock that stopped" in texts[0]
    assert "RuntimeError: the main process failed: ValueError: a clock that stopped" in texts[1]

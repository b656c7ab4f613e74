"""`make gpu-day` by a clock turned by hand, and on this CPU: order, limits, what is kept."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu import day, models, steps
from benchmarks.gpu.day import Outcome, Step, run_day, run_limited
from benchmarks.harness import session
from benchmarks.harness.session import Options
from benchmarks.layer.cell import LayerCell
from benchmarks.report import Results, pictures_of
from benchmarks.sections import model as model_section
from ila_kernels import Tuned
from ila_kernels.choice import Call, gpu_impl
from ila_kernels.verdict import Cell, Machine, Verdict, Verdicts

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MACHINE = Machine("a GPU", "12080", "12.8", "2.13.0", "3.9.0", "0.1")


class Day:
    """A clock that stands still but for the steps, which take as long as the script says."""

    def __init__(self, **script: float | tuple[float, object]):
        self.script, self.now, self.limits = script, 1000.0, {}
        self.reports: list[list[str]] = []

    def clock(self) -> float:
        return self.now

    def run(self, step: Step, limit_s: float) -> int | None:
        self.limits[step.name] = limit_s
        took, status = self.script[step.name] if step.name in self.script else (1.0, 0)
        self.now += min(took, limit_s)
        if isinstance(status, Exception):
            raise status
        return None if took > limit_s else status

    def report(self, outcomes: list[Outcome]) -> None:
        self.reports.append([f"{o.step} {o.state}" for o in outcomes])

    def lasts(self, plan, seconds: float) -> list[Outcome]:
        return run_day(plan, seconds, self.run, self.report, self.clock)


PLAN = [Step(name, f"{name}.json", least_s=10.0, most_s=60.0) for name in ("a", "b", "c", "d")]


def test_steps_run_in_order_and_each_is_reported_at_once():
    today = Day(a=(5.0, 0), b=(7.0, 0), c=(1.0, 0), d=(1.0, 0))
    outcomes = today.lasts(PLAN, 100.0)
    assert today.reports[-1] == ["a done", "b done", "c done", "d done"]
    assert [len(report) for report in today.reports] == [1, 2, 3, 4]
    assert [o.seconds for o in outcomes] == [5.0, 7.0, 1.0, 1.0]
    assert today.limits == dict.fromkeys("abcd", 60.0)


def test_a_step_is_cut_off_at_its_own_limit_and_the_next_one_runs():
    today = Day(a=(1e9, 0))
    outcomes = today.lasts(PLAN, 200.0)
    assert [o.state for o in outcomes] == ["cut off", "done", "done", "done"]
    assert outcomes[0].seconds == 60.0 and "a.json has the rest" in outcomes[0].why


def test_the_deadline_cuts_a_step_off_and_leaves_the_rest_out_by_name():
    today = Day(a=(50.0, 0), b=(1e9, 0))
    outcomes = today.lasts(PLAN, 70.0)
    assert today.limits == {"a": 60.0, "b": 20.0}
    assert today.reports[-1] == ["a done", "b cut off", "c left out", "d left out"]
    assert outcomes[2].why == "it needs 10 s, and 0 s are left"
    assert today.now == 1000.0 + 70.0


def test_a_step_that_would_not_fit_gives_way_to_a_shorter_one():
    plan = [Step("long", "", 50.0, 60.0), Step("short", "", 5.0, 60.0)]
    assert [o.state for o in Day().lasts(plan, 30.0)] == ["left out", "done"]


@pytest.mark.parametrize("fault", [(5.0, 1), (5.0, -11), (0.0, OSError("no such file"))])
def test_a_failing_step_does_not_stop_the_next(fault):
    today = Day(b=fault)
    outcomes = today.lasts(PLAN, 100.0)
    assert [o.state for o in outcomes] == ["done", "failed", "done", "done"]
    assert str(fault[1]) in outcomes[1].why


def test_the_plan_fits_into_nine_minutes_and_begins_with_what_is_right():
    assert [step.name for step in gpu_day.PLAN][:3] == ["self-check", "tests", "tune"]
    assert {step.name for step in gpu_day.PLAN} == set(steps.STEPS)
    assert all(step.file.endswith("-gpu.json") for step in gpu_day.PLAN)
    # Even if every step before it takes all of its time, the last one is begun.
    *first, last = gpu_day.PLAN
    assert sum(step.most_s for step in first) + last.least_s <= 9 * 60


# --- processes

WRITER = """
import subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(folder / "child").write_text(str(child.pid))
(folder / "whole.json").write_text("{}")
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_process_that_hangs_is_ended_with_what_it_started(tmp_path):
    begin = time.monotonic()
    assert run_limited([sys.executable, "-c", WRITER, str(tmp_path)], day.GRACE_S + 2.0) is None
    assert time.monotonic() - begin < day.GRACE_S + 10.0
    assert (tmp_path / "whole.json").read_text() == "{}"
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 5.0
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


@pytest.mark.parametrize("status", [0, 3])
def test_the_exit_status_of_a_process_is_its_own(status):
    assert run_limited([sys.executable, "-c", f"raise SystemExit({status})"], 60.0) == status


def test_without_a_gpu_it_says_so_in_one_line_and_fails():
    command = [sys.executable, "-m", "benchmarks.gpu_day"]
    code = "import sys, torch; torch.cuda.is_available = lambda: False; "
    code += "from benchmarks.gpu_day import main; sys.exit(main([]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (done.stdout, done.stderr.splitlines()) == ("", [gpu_day.NO_GPU])


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.mark.parametrize(("statuses", "expected"), [((0, None, 0), 0), ((0, 1, 0), 1)])
def test_the_day_writes_what_became_of_each_step(a_gpu, monkeypatch, tmp_path, statuses, expected):
    ran, script = [], iter(statuses)

    def run(command, limit_s):
        if ran:  # what came before is on the disk by now
            assert len(json.loads((tmp_path / "day-gpu.json").read_text())["steps"]) == len(ran)
        ran.append(command[command.index("--step") + 1])
        assert command[command.index("--results") + 1] == str(tmp_path)
        return next(script)

    monkeypatch.setattr(gpu_day, "run_limited", run)
    only = ["--only", "self-check", "tune", "layers"]
    assert gpu_day.main(["--results", str(tmp_path), *only]) == expected
    assert ran == only[1:]
    document = json.loads((tmp_path / "day-gpu.json").read_text())
    assert document["environment"]["gpu"] == "a GPU"
    assert [step["step"] for step in document["steps"]] == ran
    states = {0: "done", 1: "failed", None: "cut off"}
    assert [step["state"] for step in document["steps"]] == [states[s] for s in statuses]


def test_one_step_runs_in_this_process(a_gpu, monkeypatch, tmp_path):
    monkeypatch.setitem(steps.STEPS, "tune", lambda results, device: 7 if device.index == 0 else 0)
    assert gpu_day.main(["--step", "tune", "--results", str(tmp_path)]) == 7


# --- what the steps do, on this CPU

TESTS = """
import time
import pytest

pytestmark = pytest.mark.gpu

def test_right():
    pass

def test_wrong():
    time.sleep(1.1)
    assert False

def test_hangs():
    time.sleep(60)
"""


def test_outcomes_of_tests_survive_a_test_that_hangs(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom benchmarks.gpu.steps import run_tests\n"
        "run_tests(Path(sys.argv[1]), torch.device('cpu'), [sys.argv[1]])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    file, deadline = tmp_path / "tests-gpu.json", time.monotonic() + 100.0
    try:
        while time.monotonic() < deadline:
            if file.exists() and "failed" in json.loads(file.read_text())["counts"]:
                break
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    found = json.loads(file.read_text())
    assert found["counts"] == {"passed": 1, "failed": 1} and not found["finished"]
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_wrong"]


class Broken(LayerCell):
    """A cell that fails, once the cells before it are on the disk."""

    def check(self) -> None:
        known = json.loads((self.results / f"layer{SUFFIX}.json").read_text())
        assert list(known["cells"]) == [FIRST]
        raise RuntimeError("out of memory\ndetails")


SUFFIX = "-gpu" if torch.cuda.is_available() else ""
FIRST = "SmolLM2-135M q, M 16, R 8"


def test_a_cell_that_fails_costs_no_other_cell(tmp_path, capsys):
    small = Options(size="smoke", rounds=2)
    first = LayerCell(small, "SmolLM2-135M", "q", 16, 8)
    broken = Broken(small, "SmolLM2-135M", "q", 32, 8)
    object.__setattr__(broken, "results", tmp_path)
    last = LayerCell(small, "SmolLM2-135M", "k", 16, 8)
    assert steps.measure_cells("layer", [first, broken, last], small, tmp_path) == 1
    found = json.loads((tmp_path / f"layer{SUFFIX}.json").read_text())
    assert list(found["cells"]) == [first.name, last.name]
    assert {row["cell"] for row in found["rows"]} == {first.name, last.name}
    assert f"{broken.name}: RuntimeError: out of memory\n" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_is_left_out_by_name_and_fails_the_step(tmp_path, monkeypatch):
    small = Options(size="smoke", rounds=2)
    cell = LayerCell(small, "SmolLM2-135M", "q", 16, 8, strict=False)
    cell.contestants.append("ours, Triton")  # which no CPU runs
    assert steps.measure_cells("layer", [cell], small, tmp_path) == 1
    found = json.loads((tmp_path / f"layer{SUFFIX}.json").read_text())
    assert "needs a CUDA or ROCm GPU" in found["cells"][cell.name]["left_out"]["ours, Triton"]
    assert "ours" in {row["contestant"] for row in found["rows"]}
    strict = LayerCell(small, "SmolLM2-135M", "q", 16, 8)
    strict.contestants.append("ours, Triton")
    with pytest.raises(RuntimeError, match="needs a CUDA or ROCm GPU"):
        strict.check()


def test_the_costliest_layers_are_tuned_first_and_none_twice():
    found = steps.tuned_shapes()
    assert found[:2] == [((4096, (14336, 14336)), 8192), ((14336, (4096,)), 8192)]
    assert ((4096, (12288, 12288)), 8192) in found and ((12288, (4096,)), 2048) in found
    assert len(found) == len(set(found)) == 2 * 6  # q k v and o of both models are alike
    rows = [m for _, m in found]
    assert rows == sorted(rows, reverse=True)


def tuned(shapes, *, rows, rank, device, wrong=""):
    (shape,), (m,) = shapes, rows
    cell = Cell(m, shape[0], shape[1], rank, "bfloat16", "float32", False)
    ms = {"eager": (1.0,) * 7, "hybrid": (0.7,) * 7}
    left_out = {"triton": wrong} if wrong else {}
    return Tuned((Verdict(MACHINE, cell, ms, "2026-01-31", left_out),))


def test_what_was_chosen_is_rows_of_the_shipped_table(tmp_path):
    assert steps.choose(tmp_path, CPU, measure=tuned) == 0
    found = json.loads((tmp_path / "choice-gpu.json").read_text())
    names = {"Verdict": Verdict, "Machine": Machine, "Cell": Cell}
    pasted = [eval(row, names) for row in found["rows"]]
    assert pasted == [Verdict.from_json(data) for data in found["verdicts"]]
    assert len(pasted) == len(steps.tuned_shapes())
    call = Call(8192, 4096, (14336, 14336), 16, "bfloat16", "float32", False, "a GPU")
    assert gpu_impl(call, verdicts=Verdicts(pasted))[0] == "hybrid"


def test_a_candidate_with_wrong_results_fails_the_step_after_all_is_written(tmp_path):
    kinds = steps.tuned_shapes()[:2]
    wrong = "RuntimeError: wrong results, off by 1 of their size"
    assert steps.choose(tmp_path, CPU, kinds, tuned, wrong=wrong) == 1
    assert len(json.loads((tmp_path / "choice-gpu.json").read_text())["rows"]) == 2
    # One that cannot run on this GPU is no fault.
    assert steps.choose(tmp_path, CPU, kinds, tuned, wrong="RuntimeError: no descriptor") == 0


def test_choices_made_before_an_interruption_are_kept(tmp_path):
    calls = []

    def interrupted(shapes, **more):
        calls.append(shapes)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tuned(shapes, **more)

    with pytest.raises(KeyboardInterrupt):
        steps.choose(tmp_path, CPU, measure=interrupted)
    assert len(json.loads((tmp_path / "choice-gpu.json").read_text())["rows"]) == 2


# --- models of true shapes, here of tiny ones


@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_step_of_a_model_with_random_weights_is_checked_measured_and_shown(
    name, tmp_path, monkeypatch
):
    config = models.CONFIGS[name]
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    tiny = type(config).from_dict(config.to_dict() | small)
    options = Options(size="full", rounds=2, data=Path("random tokens"))
    cell = models.cell(options, name, tiny, blocks=2, rows=2, width=80)
    assert steps.measure_cells("model", [cell], options, tmp_path) == 0
    document = json.loads((tmp_path / f"model{SUFFIX}.json").read_text())
    assert document["cells"][name]["model"] == f"{name}, 2 of {config.num_hidden_layers} blocks"
    kinds = {row["contestant"] for row in document["rows"]}
    assert {"PEFT", "ours", "frozen", "PEFT, fused loss", "ours, 50% top"} <= kinds
    text = "\n".join(model_section.markdown({"model-gpu": document}))
    assert "random tokens" in text and "ours, last 50 %" in text
    for file, picture in pictures_of(model_section, Results({"model-gpu": document}, {})).items():
        picture.draw(tmp_path / file)
        assert (tmp_path / file).stat().st_size > 1000


def test_true_widths_are_those_of_the_layers():
    from benchmarks.layer.shapes import WIDTHS

    for name, config in models.CONFIGS.items():
        kv = config.num_key_value_heads * config.head_dim
        assert (config.hidden_size, kv, config.intermediate_size) == WIDTHS[name]
        assert config.num_attention_heads * config.head_dim == config.hidden_size


def test_environment_is_in_every_file(tmp_path):
    steps.write(tmp_path, "selfcheck", CPU, {"forms": {}})
    found = json.loads((tmp_path / "selfcheck-gpu.json").read_text())
    assert found["environment"]["versions"] == session.environment(CPU)["versions"]

"""`pytest benchmarks`: what it refuses, what it writes, and how that is rendered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness.busy import Busy
from benchmarks.harness.gate import GateRedError, assert_gradients
from benchmarks.harness.memory import peak_tensor_bytes
from benchmarks.harness.session import Options, Session
from benchmarks.harness.slopes import fitted
from benchmarks.harness.timing import Watch, interleaved, ratio
from benchmarks.layer.cell import LayerCell
from benchmarks.model.contestants import mask_of, whole_blocks
from benchmarks.report import Results, pictures_of
from benchmarks.sections import headline, layer, model, scaling, search_cost
from ila.masks.names import PEFT_PREFIX
from ila_kernels import eager

REPOSITORY = Path(__file__).resolve().parents[2]
# A plugin that lets the update of the eager path be a tenth too large, as a wrong kernel might.
BREAKAGE = """
from ila_kernels import eager
right = eager.update_first
def wrong(p, q, u, v, factor, gate, bias=None):
    return right(p, q, u, v, 1.1 * factor, gate, bias)
eager.update_first = wrong
right_sum = eager.add_product
def wrong_sum(out, p, q, factor, gate):
    return right_sum(out, p, q, 1.1 * factor, gate)
eager.add_product = wrong_sum
"""


def run_benchmark(
    file: str, results: Path, *options: str, plugins: Path | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"benchmarks/{file}", "--smoke", "--rounds", "2", "--results", str(results)]
    # pytest-benchmark refuses to measure in a worker of xdist; this is a session of its own.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = {**kept, "OMP_NUM_THREADS": "1"}
    if plugins is not None:
        environment["PYTHONPATH"] = str(plugins)
        options = (*options, "-p", "breakage")
    command += options
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def test_a_broken_eager_path_is_not_reported(tmp_path):
    (tmp_path / "breakage.py").write_text(BREAKAGE, encoding="utf-8")
    results = tmp_path / "results"
    done = run_benchmark("test_layer.py", results, plugins=tmp_path)
    assert done.returncode != 0
    assert "NOT MEASURED: a correctness gate is red" in done.stdout
    assert "the bound" in done.stdout
    assert "Median" not in done.stdout  # no table of times
    assert not results.exists()


def test_what_is_right_is_measured_and_written(tmp_path):
    done = run_benchmark("test_layer.py", tmp_path)
    assert done.returncode == 0, done.stdout
    document = json.loads((tmp_path / "layer.json").read_text(encoding="utf-8"))
    assert set(document) == {"environment", "options", "cells", "busy", "rows"}
    rows = [row for row in document["rows"] if row["phase"] == "both"]
    assert {"PEFT", "ours", "addmm", "frozen", "PEFT, base dtype"} <= {
        r["contestant"] for r in rows
    }
    for row in rows:
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["contestant"] != "PEFT" or row["ratio_to_peft"] == 1.0
    assert layer.markdown({"layer": document}) and layer.figures({"layer": document})


class FakeCell:
    name, contestants = "cell", ("ours",)

    def __init__(self, right=True):
        self.right = right

    def check(self):
        assert self.right, "off"

    def conditions(self):
        return {"rounds": 1}

    def measure(self):
        return [{"contestant": "ours", "median_ms": 1.0}], {"ours": [1e-3]}


def test_a_part_of_the_cells_writes_no_file(tmp_path):
    cells = [FakeCell(), FakeCell()]
    session = Session(Options(), tmp_path, {"fake": cells, "none": []})
    session.measure("fake", cells[0])
    session.write()
    assert list(tmp_path.iterdir()) == []
    session.measure("fake", cells[1])
    session.write()
    suffix = "-gpu" if torch.cuda.is_available() else ""
    assert [path.name for path in tmp_path.iterdir()] == [f"fake{suffix}.json"]


def test_another_batch_has_a_file_of_its_own(tmp_path):
    cell = FakeCell()
    session = Session(Options(batch=(4, 256)), tmp_path, {"fake": [cell]})
    session.measure("fake", cell)
    session.write()
    suffix = "-gpu" if torch.cuda.is_available() else ""
    assert [path.name for path in tmp_path.iterdir()] == [f"fake-4x256{suffix}.json"]


@pytest.mark.parametrize(
    ("file", "batch", "says"),
    [
        ("test_model.py", "4", "must be ROWSxTOKENS"),
        ("test_layer.py", "4x256", "test_model.py alone"),
    ],
)
def test_a_batch_that_means_nothing_is_refused(tmp_path, file, batch, says):
    done = run_benchmark(file, tmp_path / "results", "--batch", batch)
    assert done.returncode != 0 and says in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()


def test_one_red_gate_keeps_everything_back(tmp_path):
    good, bad = FakeCell(), FakeCell(right=False)
    session = Session(Options(), tmp_path, {"good": [good], "bad": [bad]})
    session.measure("good", good)
    with pytest.raises(GateRedError, match="off"):
        session.gate(bad)
    with pytest.raises(GateRedError, match="a gate is red"):
        session.measure("good", good)
    session.write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["backward", "forward"])
def test_a_gate_is_red_in_process_too(name, monkeypatch):
    right = getattr(eager, name)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return (
            type(found)(*(None if t is None else t * 1.1 for t in found))
            if name == "backward"
            else (found[0] * 1.1, found[1])
        )

    monkeypatch.setattr(eager, name, wrong)
    cell = LayerCell(Options(), "SmolLM2-135M", "q", 80, 8)  # above the rows left to autograd
    with pytest.raises(AssertionError, match=r"ours: .* the bound"):
        cell.check()


def test_gradients_of_a_model_are_held_to_the_budget_of_their_dtype():
    exact = {"a": torch.ones(4, dtype=torch.float64)}
    plain = {"a": torch.full((4,), 1.004)}
    assert_gradients({"a": torch.full((4,), 1.007)}, exact, plain, torch.bfloat16)
    with pytest.raises(AssertionError, match="gradient of a"):
        assert_gradients({"a": torch.full((4,), 1.05)}, exact, plain, torch.bfloat16)
    with pytest.raises(AssertionError, match="gradient of a"):
        assert_gradients({"a": torch.full((4,), torch.nan)}, exact, plain, torch.bfloat16)
    with pytest.raises(AssertionError, match="names"):
        assert_gradients({}, exact, plain, torch.bfloat16)


def test_rounds_are_interleaved_and_ratios_are_of_one_round():
    order = []
    runs = {
        name: lambda mark, turn, name=name: (order.append((turn, name)), mark()) for name in "ab"
    }
    found = interleaved(runs, 5, Watch(torch.device("cpu")), warm_up=0)
    assert [turn for turn, _ in order] == [t for t in range(5) for _ in range(2)]
    assert all({order[2 * t][1], order[2 * t + 1][1]} == {"a", "b"} for t in range(5))
    assert len({order[2 * t][1] for t in range(5)}) == 2  # not always the same one first
    assert [len(times) for times in found.values()] == [5, 5]
    # The machine became ten times slower on the way: the ratio does not see it.
    assert ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == {"median": 0.5, "p10": 0.5, "p90": 0.5}


def test_a_busy_machine_is_said():
    quiet = Busy(torch.device("cpu"), 0.0, [1.0, 1.01, 1.0, 1.02] * 5).as_dict()
    assert not quiet["busy"]
    busy = Busy(torch.device("cpu"), 99.0, [1.0, 2.0, 2.0, 1.0] * 5).as_dict()
    assert busy["busy"] and "load average was 99.0" in busy["why"][0]
    assert any("at p90 as at p10" in why for why in busy["why"])
    drifting = Busy(torch.device("cpu"), 0.0, [1.0] * 10 + [1.5] * 10).as_dict()
    assert any("at the end" in why for why in drifting["why"])


def test_peak_is_the_most_that_lives_at_once():
    def run():
        for _ in range(3):
            torch.empty(1000, dtype=torch.float32)

    first = peak_tensor_bytes(run, torch.device("cpu"))
    assert 4000 <= first < 8000

    def both():
        return torch.empty(1000), torch.empty(1000)

    assert 8000 <= peak_tensor_bytes(both, torch.device("cpu")) < 12000


def test_positions_are_where_their_names_say():
    names = [f"{PEFT_PREFIX}model.layers.{i}.{n}_proj" for i in range(10) for n in ("q", "v")]
    top, bottom = mask_of(names, 0.3, "top"), mask_of(names, 0.3, "bottom")
    assert top.open == tuple(names[14:]) and bottom.open == tuple(names[:6])
    assert whole_blocks(top) == [7, 8, 9]
    scattered = mask_of(names, 0.3, "scattered")
    assert len(scattered.open) == 6 and whole_blocks(scattered) is None
    assert mask_of(names, 1.0, "all").open == tuple(names)
    with pytest.raises(ValueError, match="position must be"):
        mask_of(names, 0.3, "middle")


def test_a_slope_is_fitted_to_every_round():
    fit = fitted([1.0, 2.0, 3.0], [[3.0, 13.0], [5.0, 15.0], [7.0, 17.0]])
    assert fit["slope_ms"] == pytest.approx(2.0) and fit["bend"] == pytest.approx(0.0, abs=1e-9)
    assert fit["intercept_ms"] == pytest.approx(6.0)
    assert fitted([1.0, 2.0, 3.0], [[1.0], [4.0], [9.0]])["bend"] > 0.03


# --- what is rendered: tiny results, made up


def document(cell: dict, rows: list[dict]) -> dict:
    return {
        "environment": {
            "device": "cpu", "threads": 2, "processor": "a CPU",
            "versions": {"torch": "2", "peft": "0"},
        },
        "options": {"clock": "wall", "data": "rows.jsonl"},
        "busy": {"busy": True, "why": ["somebody else"], "spread": 2.0},
        "cells": {"cell": {"model": "tiny", "dtype": "bfloat16", "rank": 8, "rows": 2,
                           "width": 128, "rounds": 3, **cell}},
        "rows": rows,
    }  # fmt: skip


def step(kind: str, ms: float, share=1.0, position="all", **more) -> dict:
    name = kind if position == "all" else f"{kind}, {share:.0%} {position}"
    name += ", checkpoints" * more.get("checkpoints", False)
    row = {
        "contestant": name, "kind": kind, "share": share, "position": position,
        "checkpoints": False, "cache": False, "median_ms": ms, "tokens_per_s": 1e5 / ms,
        "peak_bytes": int(ms * 2**20), "ratio_to_peft": ms / 100, "p10": ms / 110, "p90": ms / 90,
        "ratio_to_restricted": ms / 80, "restricted_p10": ms / 90, "restricted_p90": ms / 70,
    }  # fmt: skip
    return row | more


def test_both_ratios_of_a_model_are_rendered(tmp_path):
    rows = [step("PEFT", 100.0), step("ours", 80.0), step("frozen", 60.0), step("addmm", 90.0)]
    rows += [step("PEFT", 60.0, 0.3, "top"), step("ours", 44.0, 0.3, "top")]
    rows += [step("ours", 70.0, 0.3, "scattered"), step("ours", 30.0, 0.3, "top", cache=True)]
    found = {"model": document({}, rows), "model-4x64": document({"rows": 4, "width": 64}, rows)}
    text = "\n".join(model.markdown(found))
    assert "### With 4×64 tokens" in text
    assert "0.44 (0.40–0.49) | 0.55 (0.49–0.63)" in text
    assert "The machine was busy while this was measured**: somebody else" in text
    assert "On a GPU: not measured." in text
    assert_drawn(model.figures(found), ["step-memory.png", "step-time.png"], tmp_path)


def test_the_front_page_shows_the_learned_mask_beside_peft_on_it(tmp_path):
    rows = []
    for on in (False, True):
        rows += [step("PEFT", 100.0, checkpoints=on), step("ours", 80.0, checkpoints=on)]
        rows += [step("PEFT", 70.0, 0.3, "learned", checkpoints=on)]
        rows += [step("ours", 60.0, 0.3, "learned", checkpoints=on)]
    text = "\n".join(headline.summary({"headline": document({}, rows)}))
    assert "| PEFT, the learned 30 % | 0.70" in text
    assert "| this library, the learned 30 % | 0.60" in text
    assert_drawn(headline.figures({"headline": document({}, rows)}), ["headline.png"], tmp_path)
    assert headline.summary({"headline": document({}, rows[:-1])}) == []
    assert headline.summary({}) == [] and headline.figures({}) == {}


def test_a_cell_where_every_token_is_a_label_has_a_table_of_its_own(tmp_path):
    rows = [step("PEFT", 100.0) | {"cell": "cell"}, step("ours", 80.0) | {"cell": "cell"}]
    rows += [step("PEFT", 90.0) | {"cell": "every"}, step("ours", 72.0) | {"cell": "every"}]
    found = document({"labelled": 0.4, "left_out": {"PEFT, a peer": "it needs a GPU"}}, rows)
    found["cells"]["every"] = found["cells"]["cell"]
    text = "\n".join(model.markdown({"model": found}))
    assert "from rows.jsonl, 40% of them labels" in text
    assert "PEFT, a peer did not run: it needs a GPU." in text
    first, second = text.split("every token is a label")
    assert "| ours | 0.80" in first and "| ours | 0.72" in second and "0.72" not in first
    assert_drawn(model.figures({"model": found}), ["step-memory.png", "step-time.png"], tmp_path)


def test_layers_are_rendered(tmp_path):
    ceiling = {"bf16_tflops": 1.0, "memory_gb_s": 20.0, "source": "measured"}
    rows = [
        {
            "cell": cell, "contestant": name, "phase": phase, "median_ms": 2.0, "p10": 0.4,
            "p90": 0.6, "ratio_to_peft": 1.0 if name == "PEFT" else 0.5, "gate": None,
            "dropout": 0.0, "peak_bytes": 50 if name == "ours" else 100, "tflop_s": 0.25,
            "gb_s": 5.0, "flop_per_byte": x, "share_of_roofline": 0.25,
        }
        for cell, x in (("one", 4.0), ("two", 100.0))
        for name in ("PEFT", "ours", "frozen")
        for phase in ("forward", "backward", "both")
    ]  # fmt: skip
    found = {"layer": document({"ceiling": ceiling, "adapters": "float32"}, rows)}
    text = "\n".join(layer.markdown(found))
    assert "| one | 2 | 0.50 (0.40–0.60) | 0.50 (0.40–0.60) | 25 % | 0.50 |" in text
    assert_drawn(layer.figures(found), ["roofline.png"], tmp_path)


def test_the_cost_of_a_search_is_rendered():
    rows = [step("PEFT", 100.0), step("ours", 80.0), step("ours, stage 1", 84.0)]
    total = {"kind": "total", "method": "path", "stage1_steps": 400, "stage2_steps": 128}
    total |= {"total_ms": 1.0, "lora_steps": 500.0, "shares": {"1600": {"ours": 0.31}}}
    text = "\n".join(search_cost.markdown({"search-cost": document({}, [*rows, total])}))
    assert "| ours, stage 1 | 0.84 (0.76–0.93) | 1.05 | 84 |" in text
    assert "| `path` | 400 + 128 | 500 | 31 % |" in text


def test_scaling_is_rendered(tmp_path):
    rows = []
    for sweep in scaling.AXES:
        for kind in ("PEFT", "ours"):
            shared = {"sweep": sweep, "kind": kind}
            for x in (1, 2, 4):
                rows.append(shared | {"x": x, "median_ms": x, "p10_ms": x - 0.5, "p90_ms": x + 1})
            fit = {"slope_ms": 1.0, "slope_p10_ms": 0.9, "slope_p90_ms": 1.1}
            rows.append(shared | fit | {"fit": True, "intercept_ms": 0.0, "bend": 0.02})
    found = {"scaling": document({}, rows)}
    assert "| rank, ours | 1 (0.9–1.1) ms per rank | 0 ms | 2 % |" in "\n".join(
        scaling.markdown(found)
    )
    assert_drawn(scaling.figures(found), ["scaling.png"], tmp_path)


@pytest.mark.parametrize("section", [layer, model, scaling, search_cost])
def test_without_results_nothing_is_rendered(section):
    results = Results({}, {})
    assert section.markdown(results.content) == [] and pictures_of(section, results) == {}


def assert_drawn(figures: dict, names: list[str], folder: Path) -> None:
    assert sorted(figures) == names
    for name, draw in figures.items():
        draw(folder / name)
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

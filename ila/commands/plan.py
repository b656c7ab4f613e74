"""Run a study as one plan: learn masks, compare them, train all and selected layers.

Every step is an ``ila`` command in its own process, so that each has its own peak memory. The plan
skips a step whose result exists and resumes an interrupted one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

# Keeps the options of a plan: a rerun skips finished steps, so no option may change.
PLAN_MARKER = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Steps to run, and their options.

    Attributes:
        model: Model folder or hub id.
        data: Name -> instruction file; each gets a mask.
        trained_on: Names of the sets to train on, with all layers and with the selected ones.
        out: Folder of all results.
        top: Share of layers to keep.
        learn: Further options of ``ila learn``.
        train: Further options of ``ila train``.
        both: Further options of both commands.
    """

    model: str
    data: Mapping[str, Path]
    trained_on: Sequence[str]
    out: Path
    top: float = 0.3
    learn: Sequence[str] = field(default_factory=tuple)
    train: Sequence[str] = field(default_factory=tuple)
    both: Sequence[str] = field(default_factory=tuple)


def run_plan(plan: Plan, screen: Console) -> None:
    """Run every step of a plan without a result.

    Raises:
        RuntimeError: If a step fails; the message holds its command.
    """
    for name, data in plan.data.items():
        run = plan.out / f"learn-{name}"
        options = ["--model", plan.model, "--data", str(data), *plan.both, *plan.learn]
        _step(screen, f"Which layers matter for {name}?", "learn", run, "mask.json", options)
    runs = [str(plan.out / f"learn-{name}") for name in plan.data]
    if len(runs) > 1:
        screen.rule("How far do the masks agree?")
        _ila("compare", *runs, "--json", str(plan.out / "compare.json"))
    for name in plan.trained_on:
        _train(plan, name, screen)


def _train(plan: Plan, name: str, screen: Console) -> None:
    mask = plan.out / f"learn-{name}" / "selected.json"
    screen.rule(f"The best {plan.top:.0%} of the layers for {name}")
    _ila("select", str(mask.parent), "--top", str(plan.top), "--out", str(mask))
    options = ["--model", plan.model, "--data", str(plan.data[name]), *plan.both, *plan.train]
    all_layers = plan.out / f"{name}-all-layers"
    selected = plan.out / f"{name}-top-{round(100 * plan.top)}-percent"
    done = "metrics.json"
    _step(screen, f"Training all layers on {name}", "train", all_layers, done, options)
    masked = [*options, "--mask", str(mask)]
    _step(screen, f"Training the selected layers on {name}", "train", selected, done, masked)
    screen.rule(f"All layers against the selected ones: {name}")
    _ila("report", str(all_layers), str(selected), "--out", str(plan.out / f"report-{name}"))


def _step(
    screen: Console, title: str, command: str, out: Path, result: str, options: Sequence[str]
) -> None:
    screen.rule(title)
    if (out / result).exists():
        screen.print(f"{out} is done already")
        return
    resume = ["--resume"] if (out / "run.json").exists() else []
    _ila(command, *options, "--out", str(out), *resume)


def _ila(*arguments: str) -> None:
    command = [sys.executable, "-m", "ila.cli", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError(f"this step failed: ila {' '.join(arguments)}")

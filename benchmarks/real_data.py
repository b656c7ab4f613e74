"""The main job on real instruction sets, measured: one JSON file under ``benchmarks/results/``.

    python -m benchmarks.real_data --model FOLDER --data gsm8k=a.jsonl --data roleplay=b.json

For every set: a mask, stage 1's effect on held-out loss, the spread of the scores; training all
layers and the selected share at equal steps; between the sets: Jaccard beside chance and Spearman.
Finished steps are kept in ``--work``, so that an interrupted run goes on; a folder that was begun
with other options is refused.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness.busy import Busy, load_average
from ila.commands.plan import PLAN_MARKER, Plan, run_plan
from ila.masks.mask import LayerMask
from ila.runs.atomic import write_json_atomic
from ila.runs.folder import claim


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--train-on", action="append", metavar="NAME")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--method", default="path")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--stage2-steps", type=int, default=80)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=float, default=0.1)
    parser.add_argument("--top", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def plan_of(options: argparse.Namespace) -> Plan:
    """Turn the options into the steps of ``ila demo`` on these data sets."""
    data = dict(item.split("=", 1) for item in options.data)
    trained_on = list(data) if options.train_on is None else options.train_on
    return Plan(
        model=options.model,
        data={name: Path(file) for name, file in data.items()},
        trained_on=trained_on,
        out=options.work,
        top=options.top,
        learn=[
            *("--method", options.method, "--epsilon", "0"),
            *("--stage1-steps", str(options.steps), "--stage2-steps", str(options.stage2_steps)),
        ],
        train=["--steps", str(options.steps)],
        both=[
            *("--limit", str(options.limit), "--max-length", str(options.max_length)),
            *("--batch-size", str(options.batch_size), "--held-out", str(options.held_out)),
            *("--learning-rate", str(options.learning_rate), "--seed", str(options.seed)),
        ],
    )


def main() -> None:
    options = parse()
    plan = plan_of(options)
    same = {k: v for k, v in vars(options).items() if k not in ("work", "json")}
    mine = {"what": "benchmarks.real_data", "options": same}
    try:
        claim(options.work, mine, marker=PLAN_MARKER, resume=True, remedy="give another --work")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    busy = Busy(torch.device("cpu"), load_average())
    busy.sample()
    run_plan(plan, Console())
    busy.sample()
    write_json_atomic(options.json, collect(plan, vars(options)) | {"busy": busy.as_dict()})


def collect(plan: Plan, options: dict) -> dict:
    """Gather the results of a finished plan; absolute paths are reduced to names."""
    learned, environment = {}, {}
    for name in plan.data:
        mask = LayerMask.load(plan.out / f"learn-{name}")
        provenance = mask.provenance
        environment = {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": dict(provenance["versions"]),
            "layers": len(mask),
            "dtype": provenance["model"]["dtype"],
            "rank": provenance["inputs"]["rank"],
        }
        search = provenance["search"]
        learned[name] = {
            "held_out_loss": dict(provenance["held_out_loss"]),
            "stage1": dict(search["stage1"]),
            "spread": dict(search["spread"]),
            "data_fingerprint": provenance["data"]["fingerprint"],
            "rows": provenance["data"]["rows"],
        }
    trained = {}
    for name in plan.trained_on:
        for run in ("all-layers", f"top-{round(100 * plan.top)}-percent"):
            text = (plan.out / f"{name}-{run}" / "metrics.json").read_text(encoding="utf-8")
            trained[f"{name}-{run}"] = json.loads(text)
    compare = plan.out / "compare.json"
    names = {"model": Path(options["model"]).name, "data": list(plan.data)}
    kept = {k: v for k, v in options.items() if k not in ("work", "json", "model", "data")}
    return {
        "environment": environment,
        "options": {**kept, **names},
        "learned": learned,
        "agreement": json.loads(compare.read_text("utf-8")) if compare.exists() else [],
        "trained": trained,
    }


if __name__ == "__main__":
    main()

r"""Is the ranking of layers stable, and is it useful? Masks, how they agree, and trainings.

    python -m benchmarks.study --model FOLDER --data gsm8k=a.jsonl --data roleplay=b.json \
        --seeds 0 1 2 --methods path ila random --fractions 0.3 0.75 --out study.jsonl

One JSON line for each finished cell; the same command, or one with more seeds, methods or options,
goes on with the same file. Three parts, alone with ``--only``:

- ``masks``: data sets × seeds × methods, and for each method × the options that it depends on.
  Stage 1 runs once for a data set and seed; every method scores that adapter, and adapters at
  earlier milestones of the same run.
- ``agreement``: of all masks in the file that differ in one thing, Jaccard of the best 10–90 % and
  Spearman's ρ with its interval over parts of the data.
- ``train``: data sets × seeds × methods × fractions, from scratch on the layers kept, by count and
  by parameters; and all layers. First options count where several are given.

Works under ``accelerate launch`` and ``torchrun``; ``--batch-size`` is per process.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.study.agreement import compare, pairs
from benchmarks.study.cells import Bench, Plan, ways
from benchmarks.study.records import Records, digest
from ila.runs.processes import leave_process_group, leave_the_screen_to_the_main_process
from ila.search.learn import METHODS

PARTS = ("masks", "agreement", "train")
CUTS = ("count", "parameters")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--work", type=Path, help="adapters of stage 1; beside --out by default")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="random-1: a new draw")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.3])
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--milestones", type=float, nargs="+", default=[1.0])
    parser.add_argument("--s0", type=float, nargs="+", default=[4.0])
    parser.add_argument("--score-lr", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--stage2-steps", type=int, nargs="+", default=[60])
    parser.add_argument("--stage1-steps", type=int, help="as many as --steps by default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--held-out", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(arguments)
    for method in options.methods:
        name, _, number = method.partition("-")
        if name not in METHODS or (number and not (name == "random" and number.isdigit())):
            parser.error(f"--methods must be among {', '.join(METHODS)}, random-N; got {method!r}")
    if any("=" not in item for item in options.data):
        parser.error(f"--data must be NAME=FILE, got {options.data}")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    names = ("model", "steps", "learning_rate", "limit", "held_out", "max_length", "batch_size")
    return Plan(
        **{name: getattr(options, name) for name in (*names, "rank", "dtype")},
        data=dict(item.split("=", 1) for item in options.data),
        work=options.work or options.out.with_suffix(".work"),
        stage1_steps=options.stage1_steps or options.steps,
    )


def masks(bench: Bench, options: argparse.Namespace, screen: Console) -> None:
    """Every mask, all of one data set and seed together."""
    grid = (options.milestones, options.stage2_steps, options.s0, options.score_lr)
    for seed in options.seeds:
        for data in bench.plan.data:
            bench.base(data, seed)
            for way in ways(options.methods, *grid):
                mask = bench.mask(data, seed, way, options.milestones)
                cost = mask["cost"]["scores"]["seconds"]
                screen.print(f"mask {data} {seed} {way.key()}: {cost:.1f} s", highlight=False)


def agreement(records: Records, screen: Console) -> None:
    """Compare all masks of the file that differ in one thing."""
    cells = list(records.of("mask"))
    keys = [key for key, _ in cells]
    for factor, i, j in pairs(keys):
        key = {"factor": factor, "a": digest(keys[i]), "b": digest(keys[j])}
        if records.get("agreement", key) is None:
            kept = {name: value for name, value in keys[i].items() if name != factor}
            known = {"of": kept, "values": [keys[i][factor], keys[j][factor]]}
            records.add("agreement", key, known | compare(cells[i][1], cells[j][1]))
    screen.print(f"agreement: {sum(1 for _ in records.of('agreement'))} pairs", highlight=False)


def trainings(bench: Bench, options: argparse.Namespace, screen: Console) -> None:
    """All layers, then the selections, of one seed before the next."""
    first = ([values[0]] for values in (options.milestones, options.stage2_steps))
    first = (*first, options.s0[:1], options.score_lr[:1])
    for seed in options.seeds:
        for data in bench.plan.data:
            bench.base(data, seed)
            whole: list[tuple[Any, str, float]] = [(None, "", 1.0)]
            chosen = [
                (way, cut, share)
                for share in options.fractions
                for cut in options.cuts
                for way in ways(options.methods, *first)
            ]
            for way, cut, share in whole + chosen:
                loss = bench.training(data, seed, way, cut, share, options.milestones)
                name = "all layers" if way is None else f"{way.method} {cut} {share}"
                text = f"train {data} {seed} {name}: {loss['held_out_loss']:.4f}"
                screen.print(text, highlight=False)


def run(options: argparse.Namespace) -> None:
    """Do what is not done yet."""
    quiet = leave_the_screen_to_the_main_process()
    screen, parts = Console(quiet=quiet), options.only or PARTS
    records = Records(options.out)
    with closing(records), tempfile.TemporaryDirectory() as scratch:
        bench = Bench(plan_of(options), records, Path(scratch))
        if "masks" in parts:
            masks(bench, options, screen)
        if "agreement" in parts:
            agreement(records, screen)
        if "train" in parts:
            trainings(bench, options, screen)
    leave_process_group()

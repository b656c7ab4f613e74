r"""Held-out loss against total time: ways to train, each at its best learning rate.

    python -m benchmarks.frontier --model FOLDER --data gsm8k=a.jsonl --data roleplay=b.json \
        --out frontier.jsonl

One JSON line for each finished training; the same command goes on with the same file. On the first
seed every way is trained at every rate, and further where the best lies at an edge; on the other
seeds at the rate that was best there for the same data. Three parts; the first two by default:

- ``one pass``: no row is seen twice.
- ``epochs``: few rows, three times each, where the prefix cache pays.
- ``small base``: ways to choose few layers of the model of ``benchmarks.base``, on data sets that
  were not used before.

Ways to choose few layers (``benchmarks.frontier.methods``) train in one pass too.

``--time`` measures step times instead, in turns, with the CPU time of this process. ``--again``
trains the first seed's best rate of each way once more: how far do results change elsewhere?
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.frontier.methods import METHODS, PARTS, RATES, SMALL
from benchmarks.frontier.train import AGAIN, Trainings
from benchmarks.frontier.ways import Way
from benchmarks.study.cells import Bench, Plan
from benchmarks.study.records import Records

STEPS, ROWS, LENGTH, RANK = 60, 2, 192, 8
# Part -> (rows of the file, share held out): 60 rows are held out in both. One pass draws 120 of
# 540 rows; three epochs of 20 steps read 40 rows. A small base holds out 120 rows: that is cheap.
DATA = {"one pass": (600, 0.1), "epochs": (100, 0.6), SMALL: (600, 0.2)}
DEFAULT = ("one pass", "epochs")
FURTHER, MOST = 5 / 3, 4  # the next rate where the best lies at the edge; how many to try


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--way", action="append", metavar="NAME", help="these ways alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", help="to begin with")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a full run")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--time", action="store_true", help="time the steps, train nothing")
    instead.add_argument("--again", action="store_true", help="repeat what is best, once")
    options = parser.parse_args(arguments)
    if any("=" not in item for item in options.data):
        parser.error(f"--data must be NAME=FILE, got {options.data}")
    known = {way.name for ways in PARTS.values() for way in ways}
    if unknown := set(options.way or ()) - known:
        parser.error(f"--way must be of {sorted(known)}, got {sorted(unknown)}")
    return options


def plan_of(options: argparse.Namespace, part: str) -> Plan:
    """Return what all trainings of a part share."""
    limit, held_out = DATA[part]
    return Plan(
        model=options.model,
        data=dict(item.split("=", 1) for item in options.data),
        work=options.out.with_suffix(".work"),
        stage1_steps=options.steps,
        steps=options.steps,
        learning_rate=RATES["one pass"][0],
        limit=limit,
        held_out=held_out,
        max_length=LENGTH,
        batch_size=ROWS,
        rank=RANK,
        dtype="auto",
    )


def chosen(ways: Sequence[Way], names: Sequence[str] | None) -> tuple[Way, ...]:
    """Return the ways that have these names, in their own order; all without names."""
    return tuple(way for way in ways if names is None or way.name in names)


def run_part(trainings: Trainings, ways: tuple[Way, ...], options: argparse.Namespace) -> None:
    """Train every way: the rates on the first seed, then the best rate on the others.

    With ``again`` the best rate on the first seed, once more.
    """
    first, *others = options.seeds
    for way in ways:
        for data in trainings.bench.plan.data:
            best = best_rate(
                lambda rate, way=way, data=data: trainings.loss(data, first, way, rate),
                options.rates or RATES[trainings.part],
            )
            if options.again:
                replace(trainings, kind=AGAIN).loss(data, first, way, best)
                continue
            for seed in others:
                trainings.loss(data, seed, way, best)


def best_rate(train: Callable[[float], Mapping[str, Any]], rates: Sequence[float]) -> float:
    """Return the rate with the lowest held-out loss, looking further while it lies at an edge.

    Args:
        train: Rate -> result of a training.
        rates: Rates to begin with; at most ``MOST`` more are tried.

    >>> best_rate(lambda rate: {"held_out_loss": (rate - 9.0) ** 2}, [1.0, 2.0, 3.0])
    8.333
    """
    losses = {rate: train(rate)["held_out_loss"] for rate in rates}
    for _ in range(MOST):
        best = min(losses, key=losses.__getitem__)
        if best not in (min(losses), max(losses)):
            break
        further = best * FURTHER if best == max(losses) else best / FURTHER
        further = float(f"{further:.4g}")
        losses[further] = train(further)["held_out_loss"]
    return min(losses, key=losses.__getitem__)


def main() -> None:
    """Do what is not done yet."""
    options = parse()
    screen = Console()
    records = Records(options.out)
    with closing(records), tempfile.TemporaryDirectory() as scratch:
        for part in options.part or DEFAULT:
            bench = Bench(plan_of(options, part), records, Path(scratch))
            ways = chosen(PARTS[part], options.way)
            if options.time and options.way is None:
                ways = tuple(way for way in ways if way not in METHODS)
            trainings = Trainings(bench, part, options.steps, screen)
            if options.time:
                from benchmarks.frontier.times import time_steps

                time_steps(trainings, ways, options.rounds)
            else:
                run_part(trainings, ways, options)

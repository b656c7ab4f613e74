"""A budgeted selection against the plain top-k of the same time: steps timed, both trained.

    python -m benchmarks.budget --model FOLDER --mask RUN --data FILE --work DIR --json FILE

Three parts, each kept in ``--work`` so that an interrupted run goes on, and `--part` runs one alone
(the first two want a quiet machine, the third does not care):

- ``calibrate``: the rates of ``ila.price.calibration``, and a dozen random masks that the fit has
  not seen, timed beside those it has: correlation and worst error of what is predicted.
- ``time``: for every `--as-top` share, the best layers by score and the selection whose budget is
  what those take; all of them timed in turn, with all layers open.
- ``train``: each from scratch with equal steps, from the seeds given; and all layers with as many
  steps as the budget's time allows. Every seed holds out the rows that the search held out: others
  may have been read by it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from benchmarks.harness.busy import Busy, load_average
from benchmarks.harness.session import environment
from ila.commands.inputs import Inputs, Prepared, attach_adapter, prepare
from ila.masks.mask import LayerMask
from ila.models.edit import apply_mask
from ila.models.loading import find_source, load_model
from ila.price.budget import TIME, Budget, Spending
from ila.price.calibration import ALL, StepTimer, batch_of, calibrate
from ila.price.shapes import Shape
from ila.price.speed import Speed
from ila.runs.atomic import write_json_atomic
from ila.runs.folder import claim
from ila.runs.processes import processes
from ila.training.config import TrainConfig
from ila.training.train import train

PARTS = ("calibrate", "time", "train")
TRAINED = "trained"
KEPT = (
    *("steps", "held_out_loss_before", "held_out_loss"),
    *("trainable_parameters", "open_modules", "total_modules"),
)


def scattered(names: list[str], count: int = 12) -> dict[str, set[str]]:
    """Random sets of random size above random depths."""
    draw, sets = random.Random(5), {}
    for number in range(count):
        above = names[draw.randrange(len(names) - 10) :]
        size = max(1, round(draw.choice([0.1, 0.3, 0.5, 0.8]) * len(above)))
        sets[f"random {number}"] = set(draw.sample(above, size))
    return sets


class Run:
    """The parts, each reading what the one before left in ``--work``."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.work = options, options.work
        self.mask = LayerMask.load(options.mask)
        self.prepared: Prepared | None = None
        self.inputs = Inputs(
            options.model,
            str(options.data),
            limit=options.limit,
            max_length=options.max_length,
            rank=options.rank,
            alpha=2.0 * options.rank,
            seed=searched(self.mask, options.limit)["seed"],
        )

    def model(self) -> tuple[Any, Shape]:
        """The model with its adapter, and the sizes of a step."""
        base = load_model(find_source(self.options.model), device=processes().device)
        shape = Shape.of(
            base.config.to_dict(),
            rank=self.options.rank,
            rows=self.options.batch_size,
            length=self.options.max_length,
            base_bytes=base.dtype.itemsize,
        )
        return attach_adapter(base, self.inputs), shape

    def calibrate(self) -> None:
        model, shape = self.model()
        unseen = scattered(list(self.mask.scores))
        speed = calibrate(model, shape, rounds=self.options.calibration_rounds, unseen=unseen)
        write_json_atomic(self.work / "shape.json", asdict(shape))
        speed.save(self.work / "speed.json")

    def spending(self, budget: Budget) -> Spending:
        shape = Shape(**json.loads((self.work / "shape.json").read_text("utf-8")))
        return Spending(self.mask, budget, shape, Speed.load(self.work / "speed.json"))

    def chosen(self) -> dict[str, dict[str, Any]]:
        """Contestant -> its layers, counted cost and importance."""
        whole = self.spending(Budget(TIME, 1.0))
        found = {ALL: whole.described(whole.plain[-1]) | {"open": list(self.mask.scores)}}
        for share in self.options.as_top:
            top = whole.priced(self.mask.top(share).open)
            mine = self.spending(Budget(TIME, top.cost / whole.unit))
            for name, point in ((f"top {share:g}", top), (f"as top {share:g}", mine.chosen())):
                found[name] = whole.described(point) | {"open": list(point.opened)}
        return found

    def time(self) -> None:
        model, shape = self.model()
        sets = {name: set(row["open"]) for name, row in self.chosen().items()}
        steps = StepTimer(model, sets, batch_of(model, shape.rows, shape.length))
        busy = Busy(processes().device, load_average())
        busy.sample()
        times = steps.measured(self.options.rounds)
        busy.sample()
        write_json_atomic(self.work / "times.json", {"step_ms": times, "busy": busy.as_dict()})

    def train(self) -> None:
        times = json.loads((self.work / "times.json").read_text("utf-8"))["step_ms"]
        for name, row in self.chosen().items():
            gates = {n: n in row["open"] for n in self.mask.scores}
            for seed in range(self.options.seeds):
                self._train(name, LayerMask(self.mask.scores, gates), self.options.steps, seed)
                if name.startswith("as top"):
                    steps = round(self.options.steps * times[name] / times[ALL])
                    self._train(f"{ALL} in the time of {name}", None, steps, seed)

    def _train(self, name: str, mask: LayerMask | None, steps: int, seed: int) -> None:
        """Train once, unless it is done; the seed draws the adapter and the order of the rows."""
        file = self.work / TRAINED / f"{_slug(name)}-seed-{seed}.json"
        if file.exists():
            return
        rows, options = self.rows(), self.options
        base = load_model(find_source(options.model), device=processes().device)
        set_seed(seed)
        model = attach_adapter(base, self.inputs)
        if mask is not None:
            apply_mask(model, mask)
        rate, size = options.learning_rate, options.batch_size
        config = TrainConfig(
            steps=steps, learning_rate=rate, batch_size=size, seed=seed, save_every=None
        )
        metrics = train(
            model,
            rows.dataset,
            config,
            held_out=rows.held_out,
            collator=rows.collator,
            name=name,
        )
        file.parent.mkdir(exist_ok=True)
        write_json_atomic(file, {key: metrics[key] for key in KEPT})
        print(f"{name}, seed {seed}: {steps} steps, held out {metrics['held_out_loss']:.4f}")

    def rows(self) -> Prepared:
        """The rows of the search, divided as it divided them; read once."""
        if self.prepared is None:
            self.prepared = prepare(self.inputs, progress=False)
        return self.prepared

    def document(self) -> dict[str, Any]:
        """Everything measured, for the JSON file."""
        speed = asdict(Speed.load(self.work / "speed.json"))
        unseen = [row for row in speed["measured"]["steps"].values() if not row["seen"]]
        real = np.array([row["measured_ms"] for row in unseen])
        fitted = np.array([row["fitted_ms"] for row in unseen])
        options = {k: v for k, v in vars(self.options).items() if k not in ("work", "json", "part")}
        names = {key: Path(options[key]).name for key in ("model", "data", "mask")}
        trained = {
            file.stem: json.loads(file.read_text("utf-8"))
            for file in sorted((self.work / TRAINED).glob("*.json"))
        }
        return {
            "environment": environment(processes().device),
            "options": options | names,
            "speed": speed,
            "prediction": {
                "correlation": float(np.corrcoef(real, fitted)[0, 1]),
                "worst_error": float(np.max(np.abs(fitted / real - 1))),
            },
            "curves": self.spending(Budget(TIME, 1.0)).curves(),
            "contestants": self.chosen(),
            "trained": trained,
            **json.loads((self.work / "times.json").read_text("utf-8")),
        }


def searched(mask: LayerMask, limit: int) -> Mapping[str, Any]:
    """Return the inputs of a mask's search, whose division of the rows every training keeps.

    Raises:
        ValueError: The mask names no inputs, or its search divided other rows.
    """
    said = mask.provenance.get("inputs")
    if said is None:
        raise ValueError("mask must be of `ila learn`: it names no inputs, so its rows are unknown")
    mine = {"limit": limit, "held_out": Inputs.held_out, "group_copies": Inputs.group_copies}
    for name, value in mine.items():
        theirs = said.get(name, getattr(Inputs, name))
        if theirs != value:
            raise ValueError(f"mask: its search had {name}={theirs}, these trainings have {value}")
    return said


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--mask", type=Path, required=True, help="of `ila learn --method path`")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, help="one part alone; all by default")
    parser.add_argument("--as-top", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--calibration-rounds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    same = {k: v for k, v in vars(options).items() if k not in ("work", "json", "part", "seeds")}
    mine = {"what": "benchmarks.budget", "options": json.loads(json.dumps(same, default=str))}
    try:
        claim(options.work, mine, marker="budget.json", resume=True, remedy="give another --work")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    try:
        run = Run(options)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    files = {"calibrate": "speed.json", "time": "times.json", "train": ""}
    for part in PARTS if options.part is None else (options.part,):
        if not (files[part] and (options.work / files[part]).exists()):
            getattr(run, part)()
    if options.part in (None, "train"):
        write_json_atomic(options.json, run.document())


if __name__ == "__main__":
    main()

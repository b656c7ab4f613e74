"""Train one way, from the same start as every other of its data and seed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel
from rich.console import Console

from benchmarks.frontier.additive import by_kind_and_block
from benchmarks.frontier.other_rows import apart
from benchmarks.frontier.ways import Way
from benchmarks.study.cells import Bench
from benchmarks.study.cells import Way as Scoring
from ila.commands.inputs import Prepared
from ila.models.edit import apply_mask
from ila.search.adapter_updates import AdapterUpdates
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.search.spectra import SPECTRA
from ila.training.config import TrainConfig
from ila.training.train import train

PATH = "path"
FIRST, AGAIN = "frontier", "frontier again"
# Method -> how it scores: after a whole run on all layers, or without any.
SCORINGS = {
    PATH: Scoring(PATH, milestone=1.0, stage2_steps=12),
    "gate_gradient": Scoring("gate_gradient", milestone=1.0),
    "update_norm": Scoring("update_norm", milestone=1.0),
    "ila": Scoring("ila", milestone=1.0, stage2_steps=60),
    "output_norm": Scoring("output_norm", milestone=1.0, stage2_steps=60),
    "feature_norm": Scoring("feature_norm", stage2_steps=60),
    "gradient_norm": Scoring("gradient_norm", stage2_steps=60),
    **{method: Scoring(method) for method in (*SPECTRA, "random")},
}


@dataclass(frozen=True)
class Trainings:
    """Trainings of one part of the frontier, recorded as they finish.

    Attributes:
        bench: Data, models and records.
        part: Name of the part.
        full: Steps of a full run.
        screen: Shows one line for each training.
        kind: Of the lines of the records: ``FIRST``, or ``AGAIN`` for repeats.
    """

    bench: Bench
    part: str
    full: int
    screen: Console
    kind: str = FIRST

    def loss(self, data: str, seed: int, way: Way, rate: float) -> dict[str, Any]:
        """Return the held-out loss of a way, trained unless the records hold it."""
        plan = self.bench.plan
        key = {**plan.common(), "data": data, "seed": seed, "part": self.part, **way.key()}
        key |= {"learning_rate": rate, "steps": way.steps(self.full), "full": self.full}
        known = self.bench.records.get(self.kind, key)
        if known is not None:
            return known
        before = self.bench.base(data, seed)["held_out_loss"]
        model, metrics = self._train(data, seed, way, rate)
        result = {
            "name": way.name,
            "before": before,
            "held_out_loss": self.bench.loss(model, data, seed),
            "open_modules": metrics["open_modules"],
            "trainable_parameters": metrics["trainable_parameters"],
        }
        text = f"{self.part}, {data} {seed}, {way.name}, {rate:g}: {result['held_out_loss']:.4f}"
        self.screen.print(text, highlight=False)
        return self.bench.records.add(self.kind, key, result)

    def _train(
        self, data: str, seed: int, way: Way, rate: float
    ) -> tuple[PeftModel, dict[str, Any]]:
        rows, model = self.bench.rows(data, seed), self.bench.fresh(data, seed)
        config = TrainConfig(
            steps=way.steps(self.full),
            learning_rate=rate,
            batch_size=self.bench.plan.batch_size,
            seed=seed,
            save_every=None,
        )
        if way.at is not None:
            return model, self._one_run(model, rows, config, way)
        if way.opened != "all":
            apply_mask(
                model, way.mask(list(AdapterUpdates(model).layers), self._scores(data, seed, way))
            )
        return model, train(model, rows.dataset, config, collator=rows.collator, progress=False)

    def _scores(self, data: str, seed: int, way: Way) -> list[float] | None:
        if way.scored_by is None:
            return None
        if way.scored_by in ("others", "additive"):
            scores = self._of_others(data, seed)
            return scores if way.scored_by == "others" else self._explained(data, seed, scores)
        if way.scored_by == "other-rows":
            return apart(self.bench, data, seed, SCORINGS[PATH])
        return self._scored(data, seed, way.scored_by)

    def _of_others(self, data: str, seed: int) -> list[float]:
        others = [name for name in self.bench.plan.data if name != data]
        scores = [self._scored(other, seed, PATH) for other in others]
        return [fmean(each) for each in zip(*scores, strict=True)]

    def _explained(self, data: str, seed: int, scores: list[float]) -> list[float]:
        names = list(AdapterUpdates(self.bench.fresh(data, seed)).layers)
        return by_kind_and_block(names, scores)

    def _scored(self, data: str, seed: int, method: str) -> list[float]:
        return self.bench.mask(data, seed, SCORINGS[method], (1.0,))["scores"]

    def _one_run(
        self, model: PeftModel, rows: Prepared, config: TrainConfig, way: Way
    ) -> dict[str, Any]:
        """Run once; the cache changes no result beyond rounding, and only saves time here."""
        method = "gate_gradient" if way.opened.startswith("blocks") else "path"
        selection = Selection(way.choice(), at=way.at, closed="keep", method=method)
        caching = replace(config, cache_prefix=self.part == "epochs")
        with tempfile.TemporaryDirectory() as folder:
            metrics, _ = train_and_select(
                model,
                rows.dataset,
                caching,
                selection,
                collator=rows.collator,
                output_dir=Path(folder) / "run",
                progress=False,
            )
        return metrics

"""Time the steps of every way and the costs beside them, in turns on the same batches.

Recorded in milliseconds of the CPU time of this process: PEFT's own step on all layers, with
transformers' loss; a step of all layers and of every set of open layers with this library; the
forward of scoring; the singular values of all weights; filling the cache, for each row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from benchmarks.frontier.train import Trainings
from benchmarks.frontier.ways import ALL, Way
from benchmarks.harness.session import allocator, processor
from benchmarks.harness.timing import Run, Watch, interleaved
from benchmarks.model.contestants import lora
from ila.models.edit import apply_mask
from ila.models.lean_head import lean_head
from ila.models.loading import find_source, load_model
from ila.prefix.cache import PrefixCache
from ila.search.adapter_updates import AdapterUpdates
from ila.search.in_place import path_scores
from ila.search.spectra import by_weights

PEFT, CACHED, FILL, SCORE = "PEFT, all layers", ", cached", "cache, a row", "scoring, a batch"
SCAN = "singular values"
BATCHES = 8
WATCH = Watch(torch.device("cpu"), "cpu")


def time_steps(trainings: Trainings, ways: Sequence[Way], rounds: int) -> None:
    """Measure and record the step times of a part, for each data set."""
    plan = trainings.bench.plan
    for data in plan.data:
        key = {**plan.common(), "data": data, "part": trainings.part, "rounds": rounds}
        key |= {"processor": processor(), "allocator": allocator()}
        if trainings.bench.records.get("frontier times", key) is None:
            times = _Times(trainings, data).measured(ways, rounds)
            trainings.bench.records.add("frontier times", key, times)
            trainings.screen.print(f"{trainings.part}, {data}: {_medians(times)}", highlight=False)


def _medians(times: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} {median(values):.0f} ms" for name, values in times.items())


class _Times:
    """Steps of several contestants on the same batches of one data set."""

    def __init__(self, trainings: Trainings, data: str):
        self.bench, self.data, self.part = trainings.bench, data, trainings.part
        self.rows = self.bench.rows(data, 0)
        size, rows = self.bench.plan.batch_size, self.rows
        starts = range(0, BATCHES * size, size)
        self.places = [range(start, start + size) for start in starts]
        self.batches = [rows.collator([rows.dataset[i] for i in some]) for some in self.places]

    def measured(self, ways: Sequence[Way], rounds: int) -> dict[str, list[float]]:
        """Return name -> ms of each round; a round is the mean over the batches."""
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            steps, extra = self._contestants(ways, stack, Path(folder))
            turns = interleaved({name: _phase(run) for name, run in steps.items()}, rounds, WATCH)
            found = {name: [ms / BATCHES for (ms,) in each] for name, each in turns.items()}
            return {**found, **extra}

    def _contestants(
        self, ways: Sequence[Way], stack: ExitStack, folder: Path
    ) -> tuple[dict[str, Callable[[], None]], dict[str, list[float]]]:
        steps = {PEFT: _stepper(self._peft(), self.batches)}
        everything = self._ours()
        steps[ALL] = _stepper(everything, self.batches)
        updates = AdapterUpdates(everything)
        count = len(self.batches)
        (scoring,) = WATCH.time(_phase(lambda: path_scores(updates, self.batches)), 0)
        extra = {SCORE: [scoring / count]}
        for way in ways:
            name = set_of(way)
            if way.opened == "all" or name in steps:
                continue
            model = self._ours()
            names = list(AdapterUpdates(model).layers)
            closed = "drop" if way.at is None else "keep"
            scores = self._known_scores(names)
            if way.by_weights is not None:
                scores, extra[f"{SCAN}, {way.by_weights}"] = _scanned(updates, way.by_weights)
            apply_mask(model, way.mask(names, scores), closed=closed)
            steps[name] = _stepper(model, self.batches)
            if self.part == "epochs" and way.opened.startswith("blocks"):
                cache = self._cache(model, folder / name.replace(" ", "-"))
                extra[f"{FILL}, {name}"] = [cache.seconds * 1e3 / len(self.rows.dataset)]
                cached = [cache.collator([cache.dataset[i] for i in some]) for some in self.places]
                steps[name + CACHED] = _stepper(model, cached, cache)
        return steps, extra

    def _known_scores(self, names: Sequence[str]) -> list[float]:
        """Return the ``path`` scores of this data that the records hold, else equal ones."""
        for key, mask in self.bench.records.of("mask"):
            known = key["data"] == self.data and key["method"] == "path"
            if known and len(mask["scores"]) == len(names):
                return list(mask["scores"])
        return [0.0] * len(names)

    def _cache(self, model: PeftModel, folder: Path) -> PrefixCache:
        rows = self.rows
        return PrefixCache.prepare(
            model, rows.dataset, rows.collator, folder, batch_size=8, progress=False
        )

    def _ours(self) -> PeftModel:
        model = self.bench.fresh(self.data, 0)
        lean_head(model)
        return model

    def _peft(self) -> PeftModel:
        plan = self.bench.plan
        base = load_model(find_source(plan.model), plan.dtype, None, torch.device("cpu"))
        return get_peft_model(base, lora(plan.rank))


def _scanned(updates: AdapterUpdates, method: str) -> tuple[list[float], list[float]]:
    """Return the scores of all layers by their base weights, and the ms that they took."""
    found: dict[str, float] = {}
    ms = WATCH.time(_phase(lambda: found.update(by_weights(updates.layers, method))), 0)
    return list(found.values()), ms


def set_of(way: Way) -> str:
    """Return the name of a way's open layers, as its step times are recorded."""
    if way.opened == "all":
        return ALL
    return f"{way.opened}, {'from scratch' if way.at is None else 'kept'}"


def _stepper(
    model: PeftModel, batches: Sequence[dict[str, Any]], cache: PrefixCache | None = None
) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    model.train()

    def steps() -> None:
        with ExitStack() as stack:
            if cache is not None:
                stack.enter_context(cache.skipping())
            for batch in batches:
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return steps


def _phase(run: Callable[[], None]) -> Run:
    """Let the whole of a run be one phase."""

    def timed(mark: Callable[[], None], turn: int) -> None:
        run()
        mark()

    return timed

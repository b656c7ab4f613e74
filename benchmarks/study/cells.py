"""The cells of a study: one stage 1 for all that scores it, a mask, a training from scratch."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from benchmarks.study.records import Records, digest
from ila.commands.inputs import Inputs, Prepared, attach_adapter, prepare, versions
from ila.masks.mask import LayerMask
from ila.masks.names import PEFT_PREFIX
from ila.models.edit import apply_mask
from ila.models.loading import find_source, load_model
from ila.runs.atomic import write_folder_atomic, write_json_atomic
from ila.runs.processes import on_main_process, processes
from ila.search.baselines import POSITIONS, UNTRAINED
from ila.search.learn import SearchConfig, begin, mask_of, score
from ila.search.spectra import SPECTRA
from ila.search.stage1 import run_stage1
from ila.training.config import TrainConfig
from ila.training.loop import held_out_loss
from ila.training.train import train

ALL = "all layers"
KEPT = (0.01, 0.1, 0.25, 0.5, 1.0)  # an adapter is small; who asks later need not train again


@dataclass(frozen=True)
class Plan:
    """What all cells of a study share.

    Attributes:
        model: Folder or hub id.
        data: Name -> file.
        work: Folder that keeps the adapters of stage 1.
        stage1_steps: Steps of stage 1.
        steps: Steps of a training.
        learning_rate: Of both.
        limit, held_out, max_length, batch_size, rank, dtype: As on the command line of ``ila``.
    """

    model: str
    data: Mapping[str, str]
    work: Path
    stage1_steps: int
    steps: int
    learning_rate: float
    limit: int
    held_out: float
    max_length: int
    batch_size: int
    rank: int
    dtype: str

    def common(self) -> dict[str, Any]:
        """What every cell's key holds; the batch is that of all processes."""
        names = ("limit", "held_out", "max_length", "rank", "dtype", "learning_rate")
        rows = self.batch_size * processes().num_processes
        own = {name: getattr(self, name) for name in names}
        return {"model": Path(self.model).name, "batch_rows": rows, **own}

    def inputs(self, data: str, seed: int) -> Inputs:
        return Inputs(
            *(self.model, self.data[data]),
            limit=self.limit,
            held_out=self.held_out,
            max_length=self.max_length,
            dtype=self.dtype,
            rank=self.rank,
            alpha=2.0 * self.rank,
            seed=seed,
        )


@dataclass(frozen=True)
class Way:
    """One way to score layers; options that the method has no use for are None."""

    method: str
    milestone: float | None = None
    stage2_steps: int | None = None
    score_init: float | None = None
    score_lr: float | None = None

    def key(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def ways(
    methods: Sequence[str],
    milestones: Sequence[float],
    stage2_steps: Sequence[int],
    score_init: Sequence[float],
    score_lr: Sequence[float],
) -> list[Way]:
    """Every method with every option that it depends on, the first options first."""
    distinct = {}
    for method in methods:
        name = method.split("-")[0]
        marks = milestones if name not in UNTRAINED else [None]
        batchless = (*POSITIONS, *SPECTRA, "gate_gradient", "update_norm")
        counts = [None] if name in batchless else stage2_steps
        starts, rates = (score_init, score_lr) if name == "ila" else ([None], [None])
        for mark in marks:
            for count in counts:
                for start in starts:
                    for rate in rates:
                        distinct[Way(method, mark, count, start, rate)] = None
    return list(distinct)


class Bench:
    """Runs cells; data and results are kept, a model is loaded anew for each.

    Args:
        plan: What all cells share.
        records: Where results go.
        scratch: An empty folder for what trainings leave behind.
    """

    def __init__(self, plan: Plan, records: Records, scratch: Path):
        self.plan, self.records, self.scratch = plan, records, scratch
        self.prepared: tuple[Any, Prepared | None] = (None, None)

    def rows(self, data: str, seed: int) -> Prepared:
        """The encoded rows of a set; the last is kept."""
        if self.prepared[0] != (data, seed):
            self.prepared = (data, seed), prepare(self.plan.inputs(data, seed), progress=False)
        return self.prepared[1]

    def fresh(self, data: str, seed: int) -> PeftModel:
        """The model with the adapter as every run of this seed begins."""
        source = find_source(self.plan.model)
        model = load_model(source, self.plan.dtype, None, processes().device)
        set_seed(seed)
        return attach_adapter(model, self.plan.inputs(data, seed))

    def loss(self, model: PeftModel, data: str, seed: int) -> float:
        rows = self.rows(data, seed)
        return held_out_loss(model, rows.held_out, rows.collator, self.plan.batch_size)

    def base(self, data: str, seed: int) -> dict[str, Any]:
        """Held-out loss before any training, and what the data is."""
        key = {**self.plan.common(), "data": data, "seed": seed}
        known = self.records.get("base", key)
        if known is not None:
            return known
        rows, model = self.rows(data, seed), self.fresh(data, seed)
        result = {
            "held_out_loss": self.loss(model, data, seed),
            "rows": len(rows.dataset),
            "held_out_rows": len(rows.held_out),
            "fingerprint": rows.description["data"]["fingerprint"],
            "versions": versions(),
        }
        return self.records.add("base", key, result)

    def stage1_key(self, data: str, seed: int) -> dict[str, Any]:
        steps = {"stage1_steps": self.plan.stage1_steps}
        return {**self.plan.common(), "data": data, "seed": seed, **steps}

    def stage1(self, data: str, seed: int, milestones: Sequence[float]) -> Path:
        """Train the adapter once and keep it at every milestone; return where.

        A milestone is a share of the steps of one run, so its learning rate has not decayed yet.
        """
        key, total = self.stage1_key(data, seed), self.plan.stage1_steps
        folder = self.plan.work / f"{data}-{seed}-{digest(key)}"
        wanted = {max(1, round(share * total)) for share in milestones}
        missing = {n for n in wanted if not on_main_process((folder / f"step-{n}").exists)}
        if self.records.get("stage1", key) is not None and not missing:
            return folder
        missing |= {max(1, round(share * total)) for share in KEPT}
        model, rows = self.fresh(data, seed), self.rows(data, seed)
        on_main_process(lambda: folder.mkdir(parents=True, exist_ok=True))
        began = time.perf_counter()

        def keep(step: int, signal: Any) -> None:
            if step in missing:
                state = work.updates.state()
                seconds = time.perf_counter() - began
                free = {"gate_gradient": signal.mean(), "folds": signal.folds()}
                free |= {"steps": step, "seconds": seconds}
                on_main_process(lambda: _keep(work.updates, state, folder / f"step-{step}", free))

        work = self._begin(model, rows, Way("gate_gradient"), seed, after_step=keep)
        done = run_stage1(work)
        names = ("steps", "first_window_loss", "last_window_loss", "loss_window", "seconds")
        result = {name: done[name] for name in names}
        result["held_out_loss"] = self.loss(model, data, seed)
        self.records.add("stage1", key, result)
        return folder

    def _begin(self, model: PeftModel, rows: Prepared, way: Way, seed: int, **more: Any):
        method, _, number = way.method.partition("-")
        config = SearchConfig(
            method=method,
            stage1_steps=self.plan.stage1_steps,
            epsilon=0.0,
            learning_rate=self.plan.learning_rate,
            stage2_steps=way.stage2_steps or SearchConfig.stage2_steps,
            score_init=SearchConfig.score_init if way.score_init is None else way.score_init,
            score_learning_rate=way.score_lr or SearchConfig.score_learning_rate,
            batch_size=self.plan.batch_size,
            seed=seed + 1000 * int(number or 0),
            save_every=None,
        )
        where = {
            "folder": self.scratch,
            "keep": False,
            "resume": False,
            "progress": False,
        }
        return begin(model, rows.dataset, config, collator=rows.collator, **where, **more)

    def mask_key(self, data: str, seed: int, way: Way) -> dict[str, Any]:
        start = self.plan.common() | {"data": data, "seed": seed}
        return (start if way.milestone is None else self.stage1_key(data, seed)) | way.key()

    def mask(self, data: str, seed: int, way: Way, milestones: Sequence[float]) -> dict[str, Any]:
        """Scores of every layer, their spread, folds and cost."""
        key = self.mask_key(data, seed, way)
        known = self.records.get("mask", key)
        if known is not None:
            return known
        rows = self.rows(data, seed)
        stage1: dict[str, Any] = {"gate_gradient": {}, "folds": [], "steps": 0, "seconds": 0.0}
        folder = None
        if way.milestone is not None:
            step = max(1, round(way.milestone * self.plan.stage1_steps))
            folder = self.stage1(data, seed, milestones) / f"step-{step}"
            stage1 = json.loads((folder / "signal.json").read_text(encoding="utf-8"))
        model = self.fresh(data, seed)
        work = self._begin(model, rows, way, seed)
        if folder is not None:
            work.updates.load(folder)
        mask = mask_of(work, stage1, score(work, stage1))
        self._layers(mask)
        said = mask.provenance
        result = {
            "scores": list(mask.scores.values()),
            "folds": [[float(f"{x:.4g}") for x in fold] for fold in said["folds"]],
            "spread": dict(said["spread"]),
            "cost": {stage: dict(cost) for stage, cost in said["cost"].items()},
        }
        return self.records.add("mask", key, result)

    def _layers_key(self) -> dict[str, Any]:
        return {"model": Path(self.plan.model).name, "rank": self.plan.rank}

    def _layers(self, mask: LayerMask) -> None:
        """Write down once what the scores of all masks are of."""
        key = self._layers_key()
        if self.records.get("layers", key) is None:
            sizes = dict(mask.provenance["parameters"])
            names = [name.removeprefix(PEFT_PREFIX) for name in sizes]
            self.records.add("layers", key, {"names": names, "parameters": [*sizes.values()]})

    def training(
        self, data: str, seed: int, way: Way | None, cut: str, share: float, milestones: Sequence
    ) -> dict[str, Any]:
        """Held-out loss after training what a mask keeps, from scratch; all layers without one."""
        common = {**self.plan.common(), "data": data, "seed": seed, "steps": self.plan.steps}
        if way is None:
            key = {**common, "method": ALL}
        else:
            key = {**common, **self.mask_key(data, seed, way), "cut": cut, "share": share}
        known = self.records.get("train", key)
        if known is not None:
            return known
        chosen = None if way is None else self.mask(data, seed, way, milestones)["scores"]
        rows, model = self.rows(data, seed), self.fresh(data, seed)
        if chosen is not None:
            apply_mask(model, self._cut(chosen, cut, share))
        plan = self.plan
        config = TrainConfig(
            steps=plan.steps,
            learning_rate=plan.learning_rate,
            batch_size=plan.batch_size,
            seed=seed,
            save_every=None,
        )
        metrics = train(model, rows.dataset, config, collator=rows.collator, progress=False)
        names = ("open_modules", "total_modules", "trainable_parameters", "step_time_ms")
        result = {name: metrics[name] for name in names}
        result["held_out_loss"] = self.loss(model, data, seed)
        return self.records.add("train", key, result)

    def _cut(self, scores: Sequence[float], cut: str, share: float) -> LayerMask:
        layers = self.records.get("layers", self._layers_key())
        names = [PEFT_PREFIX + name for name in layers["names"]]
        mask = LayerMask(dict(zip(names, scores, strict=True)))
        if cut == "count":
            return mask.top(share)
        sizes = dict(zip(names, layers["parameters"], strict=True))
        return LayerMask(mask.scores, within(mask, sizes, share))


def within(mask: LayerMask, sizes: Mapping[str, int], share: float) -> dict[str, bool]:
    """Gates of the best layers that fit into a share of all parameters, taking what fits in turn.

    >>> mask = LayerMask({"a": 3.0, "b": 2.0, "c": 1.0})
    >>> within(mask, {"a": 5, "b": 4, "c": 1}, 0.6)
    {'a': True, 'b': False, 'c': True}
    """
    left, gates = share * sum(sizes.values()), dict.fromkeys(mask.scores, False)
    for name in mask.ranking:
        if sizes[name] <= left:
            gates[name], left = True, left - sizes[name]
    if not any(gates.values()):
        raise ValueError(f"share must leave room for one layer, got {share}")
    return gates


def _keep(adapter: Any, state: Any, folder: Path, free: Mapping[str, Any]) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    with write_folder_atomic(folder) as target:
        adapter.save(target, state)
        write_json_atomic(target / "signal.json", free)

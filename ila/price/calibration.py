"""Time training steps of a few masks side by side, and fit the time of a step of any mask.

A step is forward, backward and AdamW's update of the open adapters. One model takes a step under
each mask in turn, round after round. The time of a mask is the median, over rounds, of its ratio to
the step with all layers open, times the median of that step: a slow round slows all masks alike.
One step more has all layers open and an eighth of the labels: it tells the time of the head.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from torch import nn

from ila.data.contracts import IGNORED
from ila.masks.mask import LayerMask
from ila.masks.names import DOWN, GATE_UP, QKV
from ila.models.edit import apply_mask, masked_layers, single_adapter
from ila.models.lean_head import leaning
from ila.price.shapes import Shape
from ila.price.speed import Speed, fit, works
from ila.runs.progress import bar

ALL = "all layers"
FEW_LABELS = "all layers, an eighth of the labels"


def designed(names: Sequence[str], seed: int = 0) -> dict[str, set[str]]:
    """Choose sets that tell the rates apart.

    Three depths, each full, scattered and with its lowest layer alone; the narrowest layers and the
    widest, to tell the cost of a layer from the cost of its bytes; the last layer.
    """
    draw, sets = random.Random(seed), {ALL: set(names)}
    for depth in (0, len(names) // 3, 2 * len(names) // 3, len(names) - 1):
        above = list(names[depth:])
        where = f"{len(above)} of {len(names)} layers from the output"
        sets.setdefault(f"all {where}" if depth else ALL, set(above))
        if len(above) > 3:
            some = {above[0], *draw.sample(above[1:], max(1, round(0.3 * len(above)) - 1))}
            sets[f"30 % of {where}"] = some
            sets[f"the lowest of {where}"] = {above[0]}
    for title, kinds in (("keys and values", QKV[1:]), ("MLPs", (*GATE_UP, *DOWN))):
        some = {name for name in names if name.rpartition(".")[2] in kinds}
        if some:
            sets[title] = some
    return sets


def batch_of(model: nn.Module, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Draw random tokens, all of them labels; the time of a step does not depend on which."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def with_fewer_labels(
    batch: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Leave an eighth of each row's labels, at its end; count those before and after.

    >>> ids = torch.arange(1, 17).view(1, 16)
    >>> batch, before, after = with_fewer_labels({"input_ids": ids, "labels": ids})
    >>> batch["labels"][0, 13:].tolist(), before, after
    ([-100, 15, 16], 15, 2)
    """
    labels, length = batch["labels"].clone(), batch["labels"].shape[1]
    labels[:, : length - max(1, length // 8)] = IGNORED
    before, after = ((each[:, 1:] != IGNORED).sum() for each in (batch["labels"], labels))
    return {**batch, "labels": labels}, int(before), int(after)


class StepTimer:
    """Time training steps of one model under several masks, with an optimiser for each.

    Args:
        model: A ``PeftModel``; its weights stay, because the learning rate is 0.
        sets: Name -> open layers.
        batch: Input of every step.
        others: Name of a set -> its own input.
    """

    def __init__(
        self,
        model: PeftModel,
        sets: Mapping[str, set[str]],
        batch: Mapping[str, torch.Tensor],
        others: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ):
        names = _layer_names(model)
        self.model, self.batch, self.others = model.train(), batch, dict(others or {})
        self.masks = {
            name: LayerMask(dict.fromkeys(names, 0.0), {n: n in opened for n in names})
            for name, opened in sets.items()
        }
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def take(self, name: str) -> float:
        """Take one step under a mask; return its milliseconds."""
        apply_mask(self.model, self.masks[name])
        if name not in self.optimizers:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizers[name] = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        self._wait()
        begin = time.perf_counter()
        self.model(**self.others.get(name, self.batch)).loss.backward()
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        self._wait()
        return (time.perf_counter() - begin) * 1e3

    def _wait(self) -> None:
        if self.batch["input_ids"].is_cuda:
            torch.cuda.synchronize()

    def measured(self, rounds: int, base: str = ALL, *, progress: bool = True) -> dict[str, float]:
        """Return the median milliseconds of each mask, by its ratio to ``base`` in each round."""
        for name in self.masks:  # warm-up: allocations, the optimisers' state
            self.take(name)
        ratios: dict[str, list[float]] = {name: [] for name in self.masks}
        bases = []
        for _ in bar(range(rounds), "Rounds of steps", show=progress):
            times = {name: self.take(name) for name in self.masks}
            bases.append(times[base])
            for name, value in times.items():
                ratios[name].append(value / times[base])
        middle = statistics.median(bases)
        return {name: middle * statistics.median(seen) for name, seen in ratios.items()}


def calibrate(
    model: PeftModel,
    shape: Shape,
    *,
    rounds: int = 5,
    unseen: Mapping[str, set[str]] | None = None,
    progress: bool = True,
) -> Speed:
    """Measure the designed masks and fit the rates.

    Args:
        model: Model with the adapter of ``shape``; afterwards all layers are open.
        shape: Sizes of the model, and rows and length of the steps to take.
        rounds: Steps of each mask, after one warm-up step.
        unseen: Further sets to measure, which the fit leaves out.
        progress: Show a progress bar.

    Returns:
        The rates; ``measured`` holds each set's measured and fitted milliseconds.

    Raises:
        ValueError: If ``rounds`` is below 1, or the model does not have the sizes of ``shape``.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be ≥ 1, got {rounds}")
    names = _layer_names(model)
    sets, others = designed(names), dict(unseen or {})
    amounts = works(shape, names, [*sets.values(), *others.values()])
    batch = batch_of(model, shape.rows, shape.length)
    few, labels, fewer = with_fewer_labels(batch)
    timed = sets | others | {FEW_LABELS: set(names)}
    timer = StepTimer(model, timed, batch, {FEW_LABELS: few})
    with leaning(model):  # as training does
        times = timer.measured(rounds, progress=progress)
        timer.take(ALL)
    speed = fit(amounts[: len(sets)], [times[name] for name in sets])
    rows = {
        name: {
            "open": len(opened),
            "measured_ms": times[name],
            "fitted_ms": speed.milliseconds(work),
            "seen": name in sets,
        }
        for (name, opened), work in zip((sets | others).items(), amounts, strict=True)
    }
    speed = speed.with_head(times[ALL] - times[FEW_LABELS], labels, fewer)
    found = {"rounds": rounds, "steps": rows, "few_labels_ms": times[FEW_LABELS]}
    return replace(speed, measured={**_where(model, shape), **found})


def _layer_names(model: PeftModel) -> list[str]:
    return list(masked_layers(model, single_adapter(model, None)))


def _where(model: nn.Module, shape: Shape) -> dict[str, str | int]:
    device = next(model.parameters()).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": shape.rows,
        "length": shape.length,
        "rank": shape.rank,
    }

"""Masks and selective training on real instruction sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import gib, table
from benchmarks.sections.pieces import quietness

PAGE = "study"
TITLE = "The main job on real data"
ORDER = 10
PREFIX = "real-data-"


def searches(method: str, result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the search table: one per data set."""
    rows = []
    for name, learned in result["learned"].items():
        held, spread = learned["held_out_loss"], learned["spread"]
        rows.append(
            [
                f"`{method}`, {name}",
                f"{held['before']:.3f} → {held['after_stage1']:.3f}",
                f"{spread['min']:.4g} … {spread['max']:.4g}",
                f"{spread['std']:.2g}",
            ]
        )
    return rows


def agreements(method: str, result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the agreement table: one per pair of data sets."""
    rows = []
    for pair in result["agreement"]:
        top = {cut["fraction"]: cut for cut in pair["top"]}
        names = [pair[key].removeprefix("learn-") for key in ("a", "b")]
        cells = [f"{top[p]['jaccard']:.2f} ({top[p]['chance']:.2f})" for p in (0.1, 0.3, 0.75)]
        rho = "none" if pair["spearman"] is None else f"{pair['spearman']:.2f}"
        rows.append([f"`{method}`, {' and '.join(names)}", rho, *cells])
    return rows


def step_time(known: Mapping[str, float]) -> str:
    """Median and spread of a run's steps.

    >>> step_time({"median": 1234.0, "p10": 1100.0, "p90": 1500.0})
    '1.23 s (1.10–1.50)'
    """
    median, low, high = (known[name] / 1e3 for name in ("median", "p10", "p90"))
    return f"{median:.2f} s ({low:.2f}–{high:.2f})"


def trainings(method: str, result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the training table: one per run."""
    return [
        [
            f"`{method}`, {name}",
            f"{run['open_modules']} of {run['total_modules']}",
            f"{run['trainable_parameters'] / 1e6:.2f} M",
            f"{run['held_out_loss_before']:.3f} → {run['held_out_loss']:.3f}",
            step_time(run["step_time_ms"]),
            gib(run["peak_memory_bytes"], 2),
        ]
        for name, run in result["trained"].items()
    ]


def _results(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Method -> its result."""
    return {name.removeprefix(PREFIX): results[name] for name in results if name.startswith(PREFIX)}


def _setting(result: Mapping[str, Any]) -> str:
    options, where = result["options"], result["environment"]
    held = {name: row["held_out_loss"]["rows"] for name, row in result["learned"].items()}
    return (
        f"{options['model']}, {where['layers']} layers, {where['dtype']} with fp32 adapters of "
        f"rank {where['rank']}; {options['limit']} rows a set, cut at {options['max_length']} "
        f"tokens, of which {min(held.values())} are held out; {options['steps']} steps of "
        f"{options['batch_size']} rows in stage 1 and in training, {options['stage2_steps']} "
        f"in stage 2; seed {options['seed']}; {where['threads']} CPU threads "
        "(`python -m benchmarks.real_data --help`). Held-out loss in nats per answer token."
    )


def _trained(real: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        "**Training from scratch, equal steps.** Step times are medians (10th to 90th percentile) "
        "of runs that came one after another; ratios measured side by side are in the benchmarks. "
        + " ".join(f"`{m}`: {quietness(r)}" for m, r in real.items()),
        table(
            ["run", "layers open", "parameters", "held-out loss", "step", "peak memory"],
            [row for m, r in real.items() for row in trainings(m, r)],
        ),
    ]


def markdown(results: Mapping[str, Any]) -> list[str]:
    real = _results(results)
    if not real:
        return []
    return [
        _setting(next(iter(real.values()))),
        "**The search.** Held-out loss over stage 1, and the spread of the scores.",
        table(
            ["method, data", "held-out loss", "scores", "standard deviation"],
            [row for m, r in real.items() for row in searches(m, r)],
        ),
        "**Agreement between masks of different data sets.** Spearman's ρ of the scores, and "
        "Jaccard overlap of the best 10, 30 and 75 % beside (chance).",
        table(
            ["method, pair", "ρ", "10 %", "30 %", "75 %"],
            [row for m, r in real.items() for row in agreements(m, r)],
        ),
        *_trained(real),
    ]

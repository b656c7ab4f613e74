"""Training steps of a model: both ratios, tokens/s, memory, and two figures by open share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.sections.common import placed, save, table
from benchmarks.sections.pieces import (
    COLOURS,
    by_device,
    left_out,
    machine,
    mebibytes,
    quietness,
    share,
    untitled,
)

TITLE = "A training step of a model"
COMMAND = "`pytest benchmarks/test_model.py`"
OTHER_BATCH = re.compile(r"model-\d+x\d+(-gpu)?")
PEERS = (
    *("PEFT, base dtype", "PEFT, torch's fused loss", "PEFT, Liger's fused loss", "PEFT, our loss"),
    *("PEFT, Liger", "PEFT, dropout", "PEFT, compiled", "addmm"),
)


def _sentence(document: Mapping[str, Any]) -> str:
    cell = next(iter(document["cells"].values()))
    labels = f", {cell['labelled']:.0%} of them labels" if "labelled" in cell else ""
    if "answers" in cell:
        filled = cell["tokens_per_step"] / (cell["rows"] * cell["width"])
        labels = f", as they come: {filled:.0%} of the positions are tokens, the rest is padding, "
        labels += f"and {cell['answers']:.0%} are labels"
    if "attention" in cell:
        labels += f"; attention of every contestant: {cell['attention']}"
    return (
        f"{cell['model']}, {cell['dtype']}, rank {cell['rank']}; {cell['rows']} rows of at most "
        f"{cell['width']} tokens from {document['options']['data']}{labels}; {machine(document)}; "
        f"{cell['rounds']} interleaved rounds ({COMMAND}). {quietness(document)}"
        f"{left_out(document)}"
    )


def _rows(document: Mapping[str, Any], at: int = 0) -> list[Mapping[str, Any]]:
    """Return the rows of one of the cells, [] where there are not so many."""
    names = list(document["cells"])[at : at + 1]
    return [row for row in document["rows"] if row.get("cell", names[0]) in names] if names else []


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        share(row["ratio_to_peft"], row["p10"], row["p90"]),
        share(row["ratio_to_restricted"], row["restricted_p10"], row["restricted_p90"]),
        f"{row['median_ms']:,.0f}",
        f"{row['tokens_per_s']:,.0f}",
        mebibytes(row["peak_bytes"]),
    ]


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs for the page of benchmarks."""
    parts = by_device(results, "model", _one)
    for stem in sorted(filter(OTHER_BATCH.fullmatch, results)):
        cell = next(iter(results[stem]["cells"].values()))
        parts += [f"### With {cell['rows']}×{cell['width']} tokens", *_one(results[stem])]
    return parts


def _one(document: Mapping[str, Any]) -> list[str]:
    columns = ["time / PEFT's", "time / PEFT's on the same layers", "ms", "tokens/s", "peak"]
    parts = [
        "Forward, backward and AdamW, all contestants in turn on the same batches. Losses and "
        "gradients were held to fp64 before. Ratios are medians over rounds of the time in the "
        "same round, with p10–p90; peak is what the step allocates beside the weights. "
        + _sentence(document),
        table(
            ["", *columns], [[placed(row["contestant"]), *_cells(row)] for row in _rows(document)]
        ),
    ]
    every = _rows(document, 1)
    if every:
        cell = list(document["cells"].values())[1]
        parts += [
            f"With rows joined end to end and cut into {cell['width']} tokens, so that every token "
            "is a label (*ours, PEFT's loss* has no lean head):",
            table(
                ["", columns[0], *columns[2:]],
                [[r["contestant"], _cells(r)[0], *_cells(r)[2:]] for r in every],
            ),
        ]
    return parts


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Step time and peak memory against the open share."""
    made: dict[str, Callable[[Path], None]] = {}
    for stem, suffix in (("model", ""), ("model-gpu", "-gpu")):
        if stem in results:
            document = results[stem]
            made[f"step-time{suffix}.png"] = lambda path, d=document: _draw(d, "time", path)
            made[f"step-memory{suffix}.png"] = lambda path, d=document: _draw(d, "memory", path)
    return made


LINES = (
    # kind, position, cache, label, colour, style
    ("PEFT", "top", False, "PEFT, last layers only", "PEFT", "-"),
    ("PEFT", "scattered", False, "PEFT, the same\nscattered layers only", "PEFT", "--"),
    ("ours", "scattered", False, "ours, scattered layers", "second", "-"),
    ("ours", "top", False, "ours, last layers", "ours", "-"),
    ("ours", "top", True, "ours, last layers,\nfrozen prefix cached", "ours, cache", "-"),
)


def _draw(document: Mapping[str, Any], quantity: str, path: Path) -> None:
    """One figure: lines by open share, the floor, peers at 100 %."""
    plain = [row for row in _rows(document) if not row["checkpoints"]]
    unit = (lambda row: 100 * row["ratio_to_peft"]) if quantity == "time" else _mib
    figure, axes = untitled(size=(8.5, 5.2))
    axis = axes[0, 0]
    ends: list[tuple[float, float, str, str]] = []
    for kind, position, cache, label, colour, style in LINES:
        own = [r for r in plain if r["kind"] == kind and r["cache"] == cache]
        own = [r for r in own if r["position"] == position or (r["share"] == 1.0 and not cache)]
        own.sort(key=lambda row: row["share"])
        if not any(r["position"] == position for r in own):
            continue
        xs, ys = [100 * r["share"] for r in own], [unit(r) for r in own]
        axis.plot(xs, ys, style, color=COLOURS[colour], marker="o", linewidth=2, markersize=5)
        if quantity == "time":
            low = [y - 100 * r["p10"] for r, y in zip(own, ys, strict=True)]
            high = [100 * r["p90"] - y for r, y in zip(own, ys, strict=True)]
            errors = [[max(0.0, e) for e in part] for part in (low, high)]
            axis.errorbar(xs, ys, yerr=errors, fmt="none", color=COLOURS[colour], capsize=3)
        ends.append((xs[0], ys[0], label, COLOURS[colour]))
    _label_starts(axis, ends)
    _peers(axis, plain, unit)
    floor = next((unit(r) for r in plain if r["kind"] == "frozen"), None)
    if floor is not None:
        axis.plot([0, 100], [floor, floor], color=COLOURS["frozen"], linestyle="--", linewidth=1.2)
    _frame(axis, document, quantity)
    save(figure, path)


def _mib(row: Mapping[str, Any]) -> float:
    return row["peak_bytes"] / 2**20


def _spaced(values: list[float], gap: float) -> list[float]:
    """The values in their order, moved up until neighbours are ``gap`` apart.

    >>> _spaced([1.0, 1.2, 5.0], 1.0)
    [1.0, 2.0, 5.0]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    moved, last = list(values), float("-inf")
    for at in order:
        last = moved[at] = max(values[at], last + gap)
    return moved


def _label_starts(axis: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line where it begins, left of its first point."""
    bottom, top = 0.0, axis.get_ylim()[1]
    places = _spaced([y for _, y, _, _ in ends], 0.085 * (top - bottom))
    for (x, y, label, colour), place in zip(ends, places, strict=True):
        axis.annotate(
            label, (x, y), (-4, place), xycoords="data", textcoords="data", ha="right",
            va="center", color=colour, fontsize=9,
            arrowprops=_leader(colour, from_x=1),
        )  # fmt: skip


def _peers(axis: Any, plain: list[Mapping[str, Any]], unit: Callable) -> None:
    """Contestants on all layers, and the floor, named right of 100 %."""
    named = ("PEFT", "ours", "frozen", *PEERS)
    rows = [r for r in plain if r["share"] == 1.0 and r["kind"] in named]
    top = max([axis.get_ylim()[1], *(unit(r) for r in rows)])
    axis.set_ylim(0, 1.06 * top)
    places = _spaced([unit(r) for r in rows], 0.05 * top)
    for row, place in zip(rows, places, strict=True):
        colour = COLOURS.get(row["kind"], COLOURS["other"])
        axis.plot([100], [unit(row)], "o", color=colour, markersize=6)
        names = {"addmm": "library GEMM + addmm, all", "frozen": "floor: no adapter, dx alone"}
        axis.annotate(
            names.get(row["kind"], f"{row['kind']}, all"), (100, unit(row)), (104, place),
            textcoords="data", va="center", color=colour, fontsize=9,
            arrowprops=_leader(colour, from_x=0),
        )  # fmt: skip


def _leader(colour: str, from_x: float) -> dict[str, Any]:
    """A thin line from a label's edge, 0 the left and 1 the right one, to what it names."""
    return {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (from_x, 0.5)}


def _frame(axis: Any, document: Mapping[str, Any], quantity: str) -> None:
    cell = next(iter(document["cells"].values()))
    axis.set_xlim(-42, 154)
    axis.set_xticks([10, 30, 75, 100])
    axis.set_xlabel("Linear layers that are trained, % of all")
    if quantity == "time":
        axis.set_ylabel("Time of a training step,\n% of PEFT on all layers")
        title = "Training fewer layers: what a step takes"
    else:
        axis.set_ylabel("Peak memory of a step beside the weights, MiB")
        title = "Training fewer layers: what a step allocates"
    where = document["environment"].get("gpu") or f"{document['environment']['threads']} CPU cores"
    axis.set_title(f"{title}\n{cell['model']}, LoRA rank {cell['rank']}, {where}", loc="left")

"""The front page: a training step under the mask that the library tells people to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory.capacity import total
from benchmarks.sections.common import FAINT, INK, save, table
from benchmarks.sections.memory_counts import GB, NAMES, OURS, TOKENS, chosen
from benchmarks.sections.pieces import COLOURS, machine, share, untitled

TITLE = "Summary"
ORDER = -2
MODEL = "llama-3-8b"
# Contestant of the step benchmark -> its name on the front page.
ROWS = {
    "PEFT": "PEFT, all layers",
    "ours": "this library, all layers",
    "PEFT, 30% learned": "PEFT, the learned 30 %",
    "ours, 30% learned": "this library, the learned 30 %",
}
CHECKPOINTED = ", checkpoints"


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return what the front page says, for the top of the page of benchmarks."""
    return summary(results)


def steps(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the rows of the step benchmark by contestant, {} where one is missing."""
    rows = {row["contestant"]: row for row in results.get("headline", {"rows": []})["rows"]}
    wanted = [name + suffix for name in ROWS for suffix in ("", CHECKPOINTED)]
    return rows if all(name in rows for name in wanted) else {}


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return the table of the front page, and the sentence on memory at true size."""
    rows = steps(results)
    if not rows:
        return []
    document = results["headline"]
    cell = next(iter(document["cells"].values()))
    lines = [
        [title, *_cells(rows[name]), *_cells(rows[name + CHECKPOINTED])]
        for name, title in ROWS.items()
    ]
    header = ["", "step time", "memory", "with checkpointing: step time", "memory"]
    parts = [
        table(header, lines),
        f"{cell['model']}, {cell['dtype']}, rank {cell['rank']}, {cell['rows']} rows of "
        f"{cell['width']} tokens; {machine(document)}; {cell['rounds']} interleaved rounds. Step "
        "time is relative to PEFT on all layers (p10–p90), without checkpointing and with it. "
        "Memory is what a step allocates beside the weights. PEFT is at its default, with "
        "transformers' loss; this library runs its lean head, which counts for most of the memory. "
        "All in one run, on one mask, with equal losses." + _busy(document),
    ]
    return [*parts, *_at_true_size(results)]


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = share(row["ratio_to_peft"], row["p10"], row["p90"])
    return [ratio, f"{row['peak_bytes'] / 2**20:,.0f} MiB"]


def _busy(document: Mapping[str, Any]) -> str:
    """Say that other programs used the machine, if they did; ratios within a round stand that."""
    return " Other programs used the machine meanwhile." if document["busy"]["busy"] else ""


def _at_true_size(results: Mapping[str, Any]) -> list[str]:
    if "memory" not in results:
        return []
    peaks = {}
    for on in (False, True):
        rows = chosen(results["memory"], MODEL, "bf16", on)
        keys = [("PEFT", 1.0, "all"), ("PEFT, fused loss", 1.0, "all")]
        keys += [(OURS, 1.0, "all"), (OURS, 0.3, "scattered")]
        if not all(key in rows for key in keys):
            return []
        peaks[on] = [f"{total(rows[key], TOKENS) / GB:.1f}" for key in keys]
    plain, short = peaks[False], peaks[True]
    return [
        f"At the size of {NAMES[MODEL]} ({TOKENS} tokens, LoRA over bf16, counted): PEFT peaks at "
        f"{plain[0]} GB, PEFT with this library's loss at {plain[1]}, this library at {plain[2]} "
        f"with all layers open and at {plain[3]} with 30 % of them. With gradient checkpointing "
        f"they peak at {short[0]}, {short[1]}, {short[2]} and {short[3]} GB."
    ]


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Return the picture of the front page."""
    rows = steps(results)
    return {"headline.png": partial(_draw, rows)} if rows else {}


def _draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw step time and memory as bars, without checkpointing and with it."""
    figure, axes = untitled(1, 2, size=(9.5, 3.4))
    for axis, (title, value) in zip(axes[0], _panels(rows), strict=True):
        for at, suffix in enumerate(("", CHECKPOINTED)):
            for place, name in enumerate(ROWS):
                number = value(rows[name + suffix])
                y = place + at * (len(ROWS) + 0.7)
                colour = COLOURS["ours"] if name.startswith("ours") else COLOURS["PEFT"]
                bar = axis.barh(
                    y, number, color=colour, height=0.72, alpha=1.0 if "learned" in name else 0.55
                )
                axis.bar_label(
                    bar, fmt="%.2f" if axis is axes[0, 0] else "%.0f", padding=3, fontsize=9
                )
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.14)
    names = [*ROWS.values()]
    ticks = [*range(len(ROWS)), *(place + len(ROWS) + 0.7 for place in range(len(ROWS)))]
    axes[0, 0].set_yticks(ticks, [*names, *(f"{name}, checkpoints" for name in names)])
    axes[0, 1].set_yticks(ticks, [""] * len(ticks))
    for label in axes[0, 0].get_yticklabels():
        label.set_color(FAINT if "PEFT" in label.get_text() else INK)
    save(figure, path)


def _panels(rows: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, Callable[..., float]], ...]:
    return (
        ("Step time, PEFT on all layers = 1", lambda row: row["ratio_to_peft"] * _own(rows, row)),
        ("Memory of a step, MiB", lambda row: row["peak_bytes"] / 2**20),
    )


def _own(rows: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any]) -> float:
    """Return 1, or what checkpointing costs PEFT: ratios of checkpointed rows are to PEFT's own."""
    if not row["checkpoints"]:
        return 1.0
    return rows["PEFT" + CHECKPOINTED]["median_ms"] / rows["PEFT"]["median_ms"]

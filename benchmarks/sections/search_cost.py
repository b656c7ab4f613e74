"""What the search costs, per step and in all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import table
from benchmarks.sections.pieces import by_device, machine, quietness, share

TITLE = "What the search costs"
COMMAND = "`pytest benchmarks/test_search_cost.py`"


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs for the page of benchmarks."""
    return by_device(results, "search-cost", _one)


def _one(document: Mapping[str, Any]) -> list[str]:
    cell = next(iter(document["cells"].values()))
    steps = [row for row in document["rows"] if row["kind"] != "total"]
    whole = [row for row in document["rows"] if row["kind"] == "total"]
    ours = next(row["median_ms"] for row in steps if row["contestant"] == "ours")
    runs = list(whole[0]["shares"])
    lines = [
        [
            row["contestant"], share(row["ratio_to_peft"], row["p10"], row["p90"]),
            f"{row['median_ms'] / ours:.2f}", f"{row['median_ms']:,.0f}",
        ]
        for row in steps
    ]  # fmt: skip
    totals = []
    for row in whole:
        of = [f"{100 * row['shares'][run]['ours']:.0f} %" for run in runs]
        stages = f"{row['stage1_steps']} + {row['stage2_steps']}"
        totals.append([f"`{row['method']}`", stages, f"{row['lora_steps']:,.0f}", *of])
    return [
        f"One step of each stage: {cell['model']}, rank {cell['rank']}, {cell['rows']} rows of at "
        f"most {cell['width']} tokens; {machine(document)}; {cell['rounds']} interleaved rounds "
        f"({COMMAND}). {quietness(document)}",
        table(["", "time / PEFT's LoRA step", "/ our LoRA step", "ms"], lines),
        "A whole search with the default numbers of steps, derived from those times: in LoRA steps "
        "(ours), and as a share of a LoRA run of so many steps.",
        table(["method", "steps", "LoRA steps", *(f"of {run} steps" for run in runs)], totals),
    ]

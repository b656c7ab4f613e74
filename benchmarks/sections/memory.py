"""Memory of a training step at true size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory.capacity import at, longest, total
from benchmarks.sections import memory_figures
from benchmarks.sections.common import picture, placed, table
from benchmarks.sections.memory_counts import (
    BASES,
    CARDS_GB,
    GB,
    NAMES,
    OURS,
    ROWS,
    TOKENS,
    chosen,
    label,
)

TITLE = "Memory at true size: what fits on which card"
ORDER = 20
FIRST = "llama-3-8b"  # shown in full, with figures; the others unfold
# File name without base -> (how it is drawn, what it shows).
FIGURES = {
    "memory-step-{base}.png": (memory_figures.stacked, "Stacked bars: memory of a training step"),
    "memory-by-share-{base}.png": (
        memory_figures.by_share,
        "Lines: memory of a training step against the share of layers that is trained",
    ),
}


def parts_table(results: Mapping[str, Any], model: str, base: str) -> str:
    """Bytes by part at one length, without checkpoints; the last column with them."""
    plain, short = (chosen(results, model, base, on) for on in (False, True))
    rows = []
    for key in (key for key in ROWS if key in plain):
        row = plain[key]
        cells = [row["weights"] + row["adapters"], row["optimizer"], row["gradients"]]
        cells += [at(row["kept"], TOKENS), total(row, TOKENS), total(short[key], TOKENS)]
        rows.append([label(key), *(f"{count / GB:.2f} GB" for count in cells)])
    names = ["weights", "AdamW", "gradients", "kept", "peak", "peak with checkpoints"]
    return table(["", *names], rows)


def cards_table(results: Mapping[str, Any], model: str, base: str) -> str:
    """The longest row of tokens for each card, without checkpoints and with them."""
    tables = [chosen(results, model, base, on) for on in (False, True)]
    header = [f"{card} GB{how}" for how in ("", ", checkpoints") for card in CARDS_GB]
    rows = []
    for key in (key for key in ROWS if key in tables[0]):
        counts = [longest(rows_of[key], card * GB) for rows_of in tables for card in CARDS_GB]
        rows.append([label(key), *(f"{n:,}" if n else "–" for n in counts)])
    return table(["", *header], rows)


def peaks(results: Mapping[str, Any], model: str) -> str:
    """How far the contestants are apart without and with gradient checkpointing, in a sentence."""
    ranges = []
    for checkpointing in (False, True):
        rows = chosen(results, model, "bf16", checkpointing)
        sizes = [total(rows[key], TOKENS) / GB for key in ROWS if key in rows]
        ranges.append(f"{min(sizes):.1f} to {max(sizes):.1f} GB")
    return (
        f"**How much is at stake.** {NAMES[model]} over bf16, {TOKENS} tokens: the peaks of the "
        f"rows below run from {ranges[0]} without gradient checkpointing, and from {ranges[1]} "
        "with it, which keeps one input a block for all contestants alike. Of blocks below the "
        "lowest open layer not even that is kept."
    )


def spread(results: Mapping[str, Any]) -> list[str]:
    """How far the scatterings of different seeds are apart."""
    cases: dict[tuple, list[int]] = {}
    for r in results["rows"]:
        if r["position"] == "scattered" and r["contestant"] == OURS and not r["checkpointing"]:
            if r["base"] == "bf16":
                cases.setdefault((r["model"], r["share"]), []).append(at(r["kept"], TOKENS))
    ranges = [
        f"{NAMES[model]} {share * 100:.0f} %: {min(v) / GB:.2f}–{max(v) / GB:.2f} GB"
        for (model, share), v in cases.items()
        if len(v) > 1
    ]
    if not ranges:
        return []
    return [f"Kept over three random scatterings of the open layers: {'; '.join(ranges)}."]


def checked(results: Mapping[str, Any]) -> list[str]:
    """The count beside a real step."""
    if "memory-check" not in results:
        return []
    result = results["memory-check"]
    options, rows = result["options"], []
    for row in result["rows"]:
        name = placed(row["contestant"]) + (", checkpoints" if row["checkpointing"] else "")
        counted, measured = row["counted"], row["measured"]
        cells = []
        for key in ("optimizer", "kept", "peak"):
            cells += [f"{counted[key] / 2**20:.2f}", f"{measured[key] / 2**20:.2f}"]
        rows.append([name, *cells, f"{measured['peak'] - counted['peak']:+,} bytes"])
    return [
        f"**The count beside a real step.** {options['model']}, {options['dtype']}, "
        f"1×{options['tokens']} tokens on a CPU: MiB counted with fake tensors, and MiB that "
        "PyTorch's CPU allocator handed out as its profiler saw them. The peak is what is alive "
        "beyond weights and AdamW's states (`python -m benchmarks.memory --check FOLDER`). What is "
        "left is known: autograd keeps PEFT's scaling factor as 8 bytes a layer, and a checkpoint "
        "keeps the state of the CPU's random generator, 5056 bytes a block, in the host's memory.",
        table(
            ["", "AdamW", "measured", "kept", "measured", "peak", "measured", "off by"],
            rows,
        ),
    ]


def markdown(results: Mapping[str, Any]) -> list[str]:
    if "memory" not in results:
        return checked(results)
    result = results["memory"]
    models = [
        m for m in sorted(NAMES, key=FIRST.__ne__) if any(r["model"] == m for r in result["rows"])
    ]
    parts = [
        f"One row of tokens, rank {result['options']['rank']} on all seven kinds of linear layer, "
        "AdamW. The whole step runs on tensors that have shapes and no data, and every tensor that "
        "is alive is counted: logits and loss (in fp32, as transformers computes them; with ours "
        "and with *fused loss*, which is our loss under PEFT's layers, a chunk at a time, every "
        "token being a label), states in the "
        "dtypes that AdamW gives them, NF4 with its scales and tables. *Kept* is what is there "
        "between forward and backward; *peak* is the most at any moment of a step, with gradients "
        "standing all the time as they do where they are accumulated "
        "(`python -m benchmarks.memory --json FILE`). The adapters are in fp32, PEFT's default, "
        "where nothing else is said.",
        "**Not in it:** what a kernel allocates inside of itself, the allocator's rounding and "
        "fragmentation, the CUDA context (some hundred MB), and other programs. No GPU has "
        "confirmed these numbers. GB are 10⁹ bytes. A card of 16 GB is taken as that, 7 % less "
        "than the 16 GiB that such cards have: room for some of what is not in the count.",
        peaks(result, models[0]),
    ]
    for model in models:
        # One model is in the open; the others unfold.
        folded = model != models[0]
        parts += [f"<details><summary>{NAMES[model]}</summary>"] if folded else []
        for base in BASES:
            parts += _model(result, model, base)
        parts += ["</details>"] if folded else []
    return [*parts, *spread(result), *checked(results)]


def _model(result: Mapping[str, Any], model: str, base: str) -> list[str]:
    """Figure and tables of one model over one base."""
    name, says = NAMES[model], BASES[base]
    parts = [f"### {name}, {says}"]
    if model == FIRST:
        parts += [
            picture(file.format(base=base), f"{shows} of {name}, {says}")
            for file, (_, shows) in FIGURES.items()
        ]
    return [
        *parts,
        f"Bytes of a step over 1×{TOKENS} tokens; the last column with gradient checkpointing:",
        parts_table(result, model, base),
        "The longest row of tokens that fits, exact by the count, whatever lengths the model was "
        "made for; –: not one token:",
        cards_table(result, model, base),
    ]


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    if "memory" not in results:
        return {}
    result = results["memory"]
    return {
        name.format(base=base): partial(draw, result, FIRST, base)
        for base in BASES
        for name, (draw, _) in FIGURES.items()
        if chosen(result, FIRST, base, False)
    }

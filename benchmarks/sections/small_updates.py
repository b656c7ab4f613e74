"""What is left of a small update in 16 bits, by the order in which it is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import table
from benchmarks.sections.pieces import quietness, share

PAGE = "how-it-works"
TITLE = "The update comes first"
ORDER = 40
NAMES = {"PEFT": "PEFT", "base first": "`addmm` after the base", "ours": "ours"}


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs for the page on how it works."""
    if "small-updates" not in results:
        return []
    found = results["small-updates"]
    options = found["options"]
    rows = [
        [f"{row['size']:g}"] + [f"{row[of][name]:.2f}" for of in ("y", "dx") for name in NAMES]
        for row in found["rows"]
    ]
    header = [
        "update / base product",
        *(f"{of}: {said}" for of in ("y", "dx") for said in NAMES.values()),
    ]
    timed = [
        [
            f"{row['model']} {row['layer']}, M {row['m']}",
            share(row["median"], row["p10"], row["p90"]),
        ]
        for row in found["timed"]
    ]
    timed += [
        [
            f"SmolLM2-135M, a training step of {row['rows']} × {row['width']} tokens",
            share(row["median"], row["p10"], row["p90"]),
        ]
        for row in found["steps"]
    ]
    return [
        "A bf16 y holds 8 bits, so an update that is added to it afterwards is lost where it is "
        "less than half of the last one; training begins there, at B = 0. We write the update and "
        "let the base GEMM add to it in fp32, before the one rounding of y. The share of the "
        f"update that is left, bf16 with fp32 adapters, M = {options['m']}, K = N = "
        f"{options['k']}, R = {options['rank']}:",
        table(header, rows),
        "On a CPU a bf16 y or dx of 1 MiB and more, or of sums of more than 1024 terms, keeps the "
        "base first, because oneDNN's product with β = 1 takes longer there; so do packed "
        "weights and up to 64 rows. Time of our op "
        "over the same code with the base first everywhere, forward and backward on a CPU, "
        f"medians of {options['rounds']} interleaved rounds with p10–p90 "
        f"(`python -m benchmarks.small_updates --json FILE`). {quietness(found)}",
        table(["bf16, R 16", "ours / base first"], timed),
    ]

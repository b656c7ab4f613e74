"""QLoRA beside PEFT's: losses of the same steps, and peak memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import placed, table
from benchmarks.sections.pieces import mebibytes

TITLE = "QLoRA beside PEFT's"
ORDER = 35


def markdown(results: Mapping[str, Any]) -> list[str]:
    runs = [results[name] for name in sorted(results) if name.startswith("qlora-")]
    if not runs:
        return []
    rows = []
    for run in runs:
        options = run["options"]
        for name, row in run["rows"].items():
            over = None
            if row["peak_bytes"] is not None:
                over = row["peak_bytes"] - row["loaded_bytes"]
            rows.append(
                [
                    f"{placed(name)}, {options['load_in']}, computing in {options['dtype']}",
                    f"{row['losses'][0]:.4f} → {row['losses'][-1]:.4f}",
                    # Who trains fewer layers has other losses.
                    f"{row['largest_relative_difference']:.1e}" if name == "ours" else "",
                    mebibytes(over),
                ]
            )
    shared = runs[0]["options"]
    return [
        f"{shared['model']}, rank {shared['rank']}, {shared['steps']} steps of {shared['rows']}×"
        f"{shared['tokens']} tokens drawn at random, each contestant in a process of its own from "
        "the same weights. The third column is the largest relative difference of a step's loss "
        "from PEFT's; the last what the process held at its peak beyond the loaded model "
        "(`python -m benchmarks.qlora --help`).",
        table(["", "loss", "off PEFT's", "peak"], rows),
    ]

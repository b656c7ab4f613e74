"""The Triton kernels as the compiler made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import table

TITLE = "Kernels, compiled for GPUs that were not there"
ORDER = 80


def markdown(results: Mapping[str, Any]) -> list[str]:
    if "compile-report" not in results:
        return []
    result = results["compile-report"]
    rows = []
    for target in dict.fromkeys(row["target"] for row in result["rows"]):
        here = [row for row in result["rows"] if row["target"] == target]
        pairs = [(row["loop_instructions"], row["plain_loop_instructions"]) for row in here]
        over = [loop / plain - 1 for loop, plain in pairs if plain]
        rows.append(
            [
                f"`{target}`",
                str(len(here)),
                str(sum(row["spills"] > 0 for row in here)),
                f"{max(row['shared_bytes'] / row['shared_limit_bytes'] for row in here):.0%}",
                f"{max(over):+.0%}" if over else "not compared",
            ]
        )
    return [
        f"Every kernel and rank in bf16 and fp32, the compared GEMMs in fp16 too, at M = 8192, "
        f"K = N = 4096 with the tiles of the tables, compiled ahead of time by Triton "
        f"{result['triton']}; counted in the machine code, without a GPU and without any time in "
        "it (`python -m benchmarks.compile_report --json FILE`). The last column: instructions of "
        "the GEMM's main loop against the same kernel with the low-rank part compiled out, the "
        "worst row.",
        table(["target", "kernels", "that spill", "shared memory, most", "longer loop"], rows),
    ]

"""Bytes that a step keeps for backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import gib, placed, table

TITLE = "What a step keeps for backward"
ORDER = 30


def _said(result: Mapping[str, Any]) -> str:
    options = result["options"]
    return (
        "**What a step keeps for backward**, counted with tensors that hold no data: "
        f"{options['model']}, {options['rows']}×{options['tokens']} tokens, {options['dtype']}, "
        f"rank {options['rank']}; where there is dropout it is {options['dropout']}, "
        "and scattered layers were drawn with the seed in brackets "
        "(`python -m benchmarks.saved_bytes`)."
    )


def markdown(results: Mapping[str, Any]) -> list[str]:
    if "saved-bytes" not in results:
        return []
    result = results["saved-bytes"]
    places = list(next(iter(result["rows"].values()))["by_place"])
    rows = [
        [placed(name), gib(row["bytes"]), *(gib(row["by_place"][place]) for place in places)]
        for name, row in result["rows"].items()
    ]
    return [
        _said(result),
        table(["", "kept", *(f"`{p}`" if "_" in p or p == "mlp" else p for p in places)], rows),
        "By place: the part of a block, over all blocks, in which a tensor is kept. A tensor that "
        "two parts keep counts once.",
    ]

"""Scores from a search that shares no row, order or adapter with the training.

A search on the rows of a training reads them in the same order, from the same adapter. Here it
reads the next rows of the same file, by another seed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.study.cells import Bench, Way
from ila.data.rows import load_rows
from ila.runs.atomic import write_text_atomic

SEEDS_APART = 100  # from the seed of the training


def apart(bench: Bench, data: str, seed: int, way: Way) -> list[float]:
    """Return the scores of a search on the rows of a set that no training of the plan reads.

    Args:
        bench: Data, models and records; the scores are kept there.
        data: Name of the set.
        seed: Of the training that will use the scores.
        way: How to score.

    Raises:
        ValueError: The set has no further rows.
    """
    plan, name = bench.plan, name_of(data)
    file = plan.work / f"{data}-other-rows.jsonl"
    plan.work.mkdir(parents=True, exist_ok=True)
    further = further_rows(plan.data[data], plan.limit)
    write_text_atomic(file, "".join(json.dumps(row) + "\n" for row in further))
    own = Bench(replace(plan, data={name: str(file)}), bench.records, bench.scratch)
    return own.mask(name, seed + SEEDS_APART, way, (1.0,))["scores"]


def name_of(data: str) -> str:
    """Return the name of the further rows of a set in the records."""
    return f"{data}, other rows"


def further_rows(file: str | Path, limit: int) -> list[dict[str, object]]:
    """Return as many rows as ``limit``, from where a plan with this limit stops reading.

    Raises:
        ValueError: There are not as many.
    """
    rows = load_rows(file, limit=2 * limit)[limit:]
    if len(rows) < limit:
        raise ValueError(f"data {file}: expected {2 * limit} rows, got {limit + len(rows)}")
    return rows

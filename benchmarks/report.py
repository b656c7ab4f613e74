"""Render the tables of README.md from the JSON files under ``benchmarks/results/``.

python -m benchmarks.report            write them between the markers
python -m benchmarks.report --check    exit 1 where README.md and the files disagree
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ila.files import write_text_atomic

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def trainings(method: str, result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the training table: one per run."""
    rows = []
    for name, run in result["trained"].items():
        memory = run["peak_memory_bytes"]
        rows.append(
            [
                f"`{method}`, {name}",
                f"{run['open_modules']} of {run['total_modules']}",
                f"{run['trainable_parameters'] / 1e6:.2f} M",
                f"{run['held_out_loss_before']:.3f} → {run['held_out_loss']:.3f}",
                "not measured" if memory is None else f"{memory / 2**30:.2f} GiB",
            ]
        )
    return rows


def speeds(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the step-time table: one per contestant."""
    return [
        [name, f"{row['speed_relative_to_peft']:.2f}", f"{row['p10']:.2f}–{row['p90']:.2f}"]
        for name, row in result["rows"].items()
    ]


def step_times(result: Mapping[str, Any]) -> list[str]:
    """Say how a step was timed, and the table."""
    options, environment = result["options"], result["environment"]
    where = "the last layers by position" if options["top"] else "the layers that a mask chose"
    clock = "CPU time" if options["clock"] == "cpu" else "Time"
    return [
        f"**{clock} of a training step**, forward and backward; open are {where}. "
        f"{options['model']}, {options['dtype'].removeprefix('torch.')}, "
        f"{options['rows']}×{options['tokens']} tokens, "
        f"{environment['device'].upper()}, threads: {environment['threads']}, "
        f"{options['rounds']} interleaved rounds "
        "(`python -m benchmarks.step_time`): how many times as fast as PEFT with all layers.",
        table(["", "times as fast", "p10–p90"], speeds(result)),
    ]


def kept_bytes(result: Mapping[str, Any]) -> list[str]:
    """Say how bytes were counted, and the table."""
    options = result["options"]
    rows = [[name, f"{row['bytes'] / 2**30:.1f} GiB"] for name, row in result["rows"].items()]
    return [
        f"**What a step keeps for backward**, counted with tensors that hold no data: "
        f"{options['model']}, {options['rows']}×{options['tokens']} tokens, {options['dtype']}, "
        f"rank {options['rank']}; where there is dropout it is {options['dropout']}, "
        "and scattered layers were drawn with the seed in brackets "
        "(`python -m benchmarks.saved_bytes`).",
        table(["", "kept"], rows),
    ]


def render() -> str:
    """The Markdown between the markers."""
    found = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(HERE.glob("results/*.json"))}
    real = {k.removeprefix("real-data-"): v for k, v in found.items() if k.startswith("real-data-")}
    parts = []
    if real:
        first = next(iter(real.values()))
        options, where = first["options"], first["environment"]
        held = {name: row["held_out_loss"]["rows"] for name, row in first["learned"].items()}
        training = [row for m, r in real.items() for row in trainings(m, r)]
        parts += [
            f"{options['model']}, {where['layers']} layers, {where['dtype']} with fp32 adapters of "
            f"rank {where['rank']}; {options['limit']} rows a set, cut at {options['max_length']} "
            f"tokens, of which {min(held.values())} are held out; {options['steps']} steps of "
            f"{options['batch_size']} rows in stage 1 and in training, {options['stage2_steps']} "
            f"in stage 2; seed {options['seed']}; {where['threads']} CPU threads "
            "(`python -m benchmarks.real_data --help`). Held-out loss in nats per answer token.",
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
            "**Training from scratch, equal steps.** The runs came one after another on a shared "
            "machine, so their times say nothing; step times are measured side by side below.",
            table(
                ["run", "layers open", "parameters", "held-out loss", "peak memory"],
                training,
            ),
        ]
    for name in ("step-time", "step-time-top"):
        if name in found:
            parts += step_times(found[name])
    if "saved-bytes" in found:
        parts += kept_bytes(found["saved-bytes"])
    return "\n\n".join(parts) if parts else "Nothing measured yet."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if options.check:
        if wanted != text:
            sys.exit("README.md does not match benchmarks/results: run python -m benchmarks.report")
        return
    write_text_atomic(README, wanted)


if __name__ == "__main__":
    main()

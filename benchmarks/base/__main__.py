r"""Pretrain the small Llama, and write functions that it has not read, with their docstrings.

    python -m benchmarks.base --texts FOLDER --out FOLDER

Leaves ``small-llama`` and ``docstrings.json`` in the folder; half an hour of one core. The seed is
fixed: on one machine with one Python the same weights come out. The trainings on it:

    python -m benchmarks.frontier --part "small base" --model OUT/small-llama \
        --out small-base.jsonl --data rasbt=rasbt_instruction_data.json \
        --data docstrings=OUT/docstrings.json

``--texts`` is a folder with a sample of TinyStories, the training rows of GSM8K, and the role play
and tool use of GPTeacher; *rasbt* is the instruction data of rasbt/LLMs-from-scratch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.base.pretrain import pretrain
from benchmarks.base.texts import docstring_rows, texts
from ila.runs.atomic import write_json_atomic

MODEL, ROWS = "small-llama", "docstrings.json"


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.base", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--texts", type=Path, required=True, help="folder with text/ and instruct/")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / ROWS).exists():
        write_json_atomic(options.out / ROWS, docstring_rows())
    if not (options.out / MODEL).exists():
        loss = pretrain(texts(options.texts), options.out / MODEL)
        print(f"loss of the last tenth of the steps: {loss:.3f} nats a token")


if __name__ == "__main__":
    main()

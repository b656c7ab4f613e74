"""Pretrain the small Llama and write the docstrings that it has not read.

    python -m benchmarks.base --texts FOLDER --out FOLDER

Leaves ``small-llama`` and ``docstrings.json`` in the folder. About twenty minutes of one core; the
seed is fixed, and on one machine with one Python the same weights come out.
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
    rows = docstring_rows()
    write_json_atomic(options.out / ROWS, rows)
    print(f"{len(rows)} docstrings")
    if not (options.out / MODEL).exists():
        loss = pretrain(texts(options.texts), options.out / MODEL)
        print(f"loss of the last tenth of the steps: {loss:.3f} nats a token")


if __name__ == "__main__":
    main()

"""Write ``docs/families.md``: every family is tried, every byte is counted.

python -m benchmarks.families [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers

from benchmarks.families.kept import CONTESTANTS, ROWS, SHAPES, TOKENS, of_one_block
from benchmarks.families.models import BLOCKS, FAMILIES
from benchmarks.families.trial import OPEN, Trial, try_family
from benchmarks.memory.true_size import RANK

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEADER = ("family", "q, k, v together", "lean MLP", "frozen prefix", "cache", "notes")
MIB = 2**20


def line(cells: Iterable[object]) -> str:
    """Return a row of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def row(trial: Trial) -> str:
    """Return the row of a family."""
    notes = trial.notes
    short = trial.cache.partition(":")[0]
    if short != trial.cache and trial.prefix != "none":
        notes = "; ".join(part for part in (notes, trial.cache.removeprefix("refused: ")) if part)
    return line((*trial[:4], short, notes))


def table(header: Sequence[object], rows: Iterable[str]) -> str:
    """Return a whole table."""
    return "\n".join([line(header), line(["---"] * len(header)), *rows])


def kept_rows() -> list[str]:
    """Count the bytes of every model and contestant: a row for each model."""
    rows = []
    for name in SHAPES:
        counts = [of_one_block(name, contestant) for contestant in CONTESTANTS]
        cells = [f"{count / MIB:,.0f} MiB ({count / counts[0]:.0%})" for count in counts]
        rows.append(line((name, *cells)))
    return rows


def page(trials: Iterable[Trial], kept: Iterable[str]) -> str:
    """Return the text of the page."""
    return f"""# Families

Three savings depend on the code of a model: one op for q, k and v, the lean MLP, and the cache of
the frozen prefix. The name of a class decides none of them.

* **q, k, v together**: the forward of the attention calls q_proj, k_proj and v_proj on one x, once
  and in every run. Its source says so. A result is used only for the very x that it was computed
  from.
* **lean MLP**: the forward compiles to the code of `down_proj(act_fn(gate_proj(x)) * up_proj(x))`,
  and `act_fn` is torch's silu or gelu. Each class is compared with its own forward once, in fp64,
  to the bit. Its gate_proj and up_proj compute together too.
* **frozen prefix**: blocks below the lowest open layer, when only layers of the last of {BLOCKS}
  blocks are open.
* **cache**: whether `--cache-prefix` gives the same loss and gradients, or is refused.

A block that does not fit keeps its own forward. It trains all the same, layer by layer.
`ila.attach` logs a line for each such kind of block, and `ila.explain` repeats it.

Each row was tried on a random model of {BLOCKS} blocks in fp64, with LoRA on `all-linear`. Loss
and all gradients are those of plain PEFT to 1e-10: with all layers open, with a random {OPEN:.0%}
open, and with layers of the last block open. With gradient checkpointing they are the same again.
transformers {transformers.__version__}.

{table(HEADER, map(row, trials))}

A mixture of experts keeps all experts of a block in two tensors, and its router in one. PEFT adapts
them (`target_parameters`; `all-linear` names them too), and a mask opens and closes each:
[the guide](guide.md#mixtures-of-experts) tells how. PEFT's own code computes an open one.

## Bytes that a block keeps for backward

One block inside a model of true size, {ROWS} × {TOKENS} tokens, bf16, LoRA rank {RANK} on all
linear layers, all open, counted on fake tensors. The second column has the layers of this library
in blocks of transformers: a block that is computed layer by layer.

{table(("model", *CONTESTANTS), kept)}

`python -m benchmarks.families` tries every family, counts the bytes and writes this page.
`--check` compares it.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    text = page([try_family(family) for family in FAMILIES], kept_rows())
    if options.check:
        same = PAGE.read_text(encoding="utf-8") == text
        print(
            "docs/families.md is up to date" if same else "docs/families.md is not what this gives"
        )
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

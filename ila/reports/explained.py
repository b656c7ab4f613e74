"""``explain`` as a grid: one letter for each layer, blocks down, kinds across.

The functions import rich: training on a cluster does not need it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ila.masks.names import KINDS, parse_module_name

if TYPE_CHECKING:
    from rich.console import Group

    from ila.models.explain import Explanation, LayerRow

LETTERS = {
    "o": "open, computed by the op",
    "P": "open, computed by PEFT's own forward",
    "k": "kept: its update stays, frozen",
    "c": "closed, and backward crosses it",
    "·": "below the lowest open layer: no backward",
}


def letter(row: LayerRow) -> str:
    """Return the letter of a layer."""
    if row.in_prefix:
        return "·"
    if row.open:
        return "P" if row.path == "peft" else "o"
    return "c" if row.path == "bare" else "k"


def explained(explanation: Explanation) -> Group:
    """Lay out an explanation for a terminal: the grid, the letters, the totals, the reasons."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    places = {row.module: parse_module_name(row.module) for row in explanation}
    kinds = [kind for kind in KINDS if any(p and p[1] == kind for p in places.values())]
    kinds += sorted({p[1] for p in places.values() if p} - set(kinds))
    letters: dict[tuple[int, str], str] = {}
    for row in explanation:
        place = places[row.module]
        if place is not None:  # a block may have down_proj twice: its experts' and its own
            letters[place] = letters.get(place, "") + letter(row)
    table = Table(box=None, padding=(0, 1))
    table.add_column("block", justify="right")
    for kind in kinds:
        table.add_column(kind.removesuffix("_proj"), justify="center")
    for block in sorted({block for block, _ in letters}):
        table.add_row(str(block), *(letters.get((block, kind), "") for kind in kinds))
    return Group(Text(_title(explanation)), table, Text("\n".join(_lines(explanation))))


def _title(explanation: Explanation) -> str:
    opened = sum(row.open for row in explanation)
    prefix = sum(row.in_prefix for row in explanation)
    return f"{opened} of {len(explanation)} layers open, {prefix} in the frozen prefix"


def _lines(explanation: Explanation) -> list[str]:
    """Write the meaning of the letters, the bytes kept, and each reason with its count."""
    seen = Counter(letter(row) for row in explanation)
    lines = [f"{mark}  {LETTERS[mark]}: {seen[mark]}" for mark in LETTERS if seen[mark]]
    unknown = any(row.saved_bytes is None for row in explanation)
    least = "at least " if unknown else ""
    kept = f"{explanation.saved_bytes() / 2**20:,.1f} MiB at {explanation.tokens} tokens"
    lines.append(f"Kept for backward by these layers: {least}{kept}")
    reasons = Counter((row.path, row.why) for row in explanation)
    lines += [f"{count} × {path}: {why}" for (path, why), count in reasons.most_common()]
    outside = [row.module for row in explanation if parse_module_name(row.module) is None]
    lines += [f"outside the blocks: {', '.join(outside)}"] if outside else []
    return [*lines, *explanation.notes(), "--all prints a line for each layer"]

"""Write masks and training runs as tables, for a terminal and for Markdown.

The functions import rich: training on a cluster does not need it.
"""

from collections.abc import Sequence
from itertools import chain
from textwrap import wrap
from typing import TYPE_CHECKING

from ila.masks.agreement import Agreement
from ila.reports.texts import baseline_run, gib_text, loss_text, ms_text, ratio_text
from ila.runs.metrics import Metrics

if TYPE_CHECKING:
    from rich.table import Table

# A cell in parts: one line each on a terminal, one after the other in Markdown.
Cell = list[str]
NAME_WIDTH = 16


def render_compare(rows: Sequence[Agreement]) -> "Table":
    """Lay out the rows of ``compare_table`` for a terminal.

    Args:
        rows: Rows of ``compare_table``.

    Returns:
        A table to print with rich.
    """
    tops = rows[0]["top"] if rows else []
    header = ["Masks", "Rank correlation"]
    header += [f"Same in top {_percent(top['fraction'])}" for top in tops]
    body = []
    for row in rows:
        rho = ["none, equal", "scores"] if row["spearman"] is None else [f"{row['spearman']:.2f}"]
        cells = [[f"{top['jaccard']:.2f}", f"({top['chance']:.2f})"] for top in row["top"]]
        body.append([[row["a"], f"and {row['b']}"], rho, *cells])
    caption = (
        "Rank correlation: Spearman's; 1 is the same order, 0 no relation; there is none where all "
        "scores of a mask are equal, and its top layers are then the first by name.\n"
        "Same in top p: layers both choose / layers either chooses (Jaccard), "
        "and in brackets what two random choices reach."
    )
    return _table("Agreement between masks", header, body, caption)


def runs_table(runs: Sequence[Metrics]) -> "Table":
    """Lay out training runs for a terminal, each beside the first run with the most layers open.

    Args:
        runs: Results of ``load_run``, one or more.

    Returns:
        A table to print with rich; ``x`` is the ratio to that run.

    Raises:
        ValueError: No runs.
    """
    header, body, caption = _runs_cells(runs)
    return _table("Training runs", header, body, caption)


def runs_markdown(runs: Sequence[Metrics]) -> str:
    """Write the table of ``runs_table`` as Markdown.

    Args:
        runs: Results of ``load_run``, one or more.

    Returns:
        Markdown that ends with a line break.

    Raises:
        ValueError: No runs.
    """
    header, body, caption = _runs_cells(runs)
    joined = [[" ".join(parts) for parts in row] for row in body]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *joined]
    safe = [[" ".join(c.replace("|", "\\|").split()) for c in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in safe) + f"\n\n{caption}\n"


def _outside_text(run: Metrics) -> str:
    """Write the share of trained parameters that no mask can close, if there are any."""
    outside = run.get("outside_parameters")
    if not isinstance(outside, int) or not outside:
        return ""
    return f"{outside / run['trainable_parameters']:.0%} outside the mask"


def _runs_cells(runs: Sequence[Metrics]) -> tuple[list[str], list[list[Cell]], str]:
    base = baseline_run(runs)
    ratio = ratio_text if len(runs) > 1 else lambda value, of: ""
    body = []
    for run in runs:
        time, memory = run["step_time_ms"], run["peak_memory_bytes"]
        kept = run.get("kept_modules")
        cells = [
            [run["name"]],
            [
                f"{run['open_modules']} of {run['total_modules']}",
                f"({run['fraction_open']:.0%})" + (f", {kept} kept" if kept else ""),
            ],
            [
                f"{run['trainable_parameters']:,}",
                ratio(run["trainable_parameters"], base["trainable_parameters"]),
                _outside_text(run),
            ],
            [f"{loss_text(run['held_out_loss_before'])} →", loss_text(run["held_out_loss"])],
            [
                ms_text(time["median"]),
                ratio(time["median"], base["step_time_ms"]["median"]),
                f"[{ms_text(time['p10'])} to",
                f"{ms_text(time['p90'])}]",
            ],
            [gib_text(memory), ratio(memory, base["peak_memory_bytes"])],
        ]
        body.append([[part.strip() for part in cell if part.strip()] for cell in cells])
    header = ["Run", "Layers open", "Trainable parameters", "Held-out loss, before → after"]
    header += ["ms per step, median [p10 to p90]", "Peak memory, GiB"]
    places = sorted({f"{run['device']}, {run['dtype']}" for run in runs})
    caption = f"x: ratio to “{base['name']}”. " if len(runs) > 1 else ""
    caption += f"Measured on: {'; '.join(places)}."
    if len(places) > 1:
        caption += " Times and memory of different devices or types cannot be compared."
    return header, body, caption


def _table(title: str, header: list[str], body: list[list[Cell]], caption: str) -> "Table":
    """Lay out cells with one part a line, so that 80 columns break no word and no number."""
    from rich.box import SIMPLE_HEAD  # lines between columns would cost names their width
    from rich.table import Table
    from rich.text import Text  # rich reads plain strings as markup: "[p10]", "[bold]"

    table = Table(title=title, caption=Text(caption), caption_justify="left", box=SIMPLE_HEAD)
    names = [[line for part in first for line in wrap(part, NAME_WIDTH)] for first, *_ in body]
    columns = [names, *(list(cells) for cells in zip(*(rest for _, *rest in body), strict=True))]
    for index, (name, cells) in enumerate(zip(header, columns, strict=True)):
        width = max(map(len, [*name.split(), *chain.from_iterable(cells)]))
        table.add_column(Text(name), justify="right" if index else "left", width=width)
    for row in zip(*columns, strict=True):
        table.add_row(*(Text("\n".join(parts), no_wrap=True) for parts in row))
    return table


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"

"""Figures of memory at true size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.memory.capacity import STANDING, at, total
from benchmarks.sections.common import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SKY,
    new_figure,
    save,
)
from benchmarks.sections.memory_counts import (
    BASES,
    CARDS_GB,
    GB,
    NAMES,
    OURS,
    PEFT_BF16,
    RESTRICTED,
    ROWS,
    TOKENS,
    chosen,
    label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = (("weights", GREY), ("optimizer", GREEN), ("gradients", ORANGE), ("kept", BLUE))
SAYS = {
    "weights": "weights, adapters included",
    "optimizer": "AdamW's states",
    "gradients": "gradients",
    "kept": "kept for backward",
    "moment": "more at the peak: logits and their gradient",
}


def stacked(results: Mapping[str, Any], model: str, base: str, path: Path) -> None:
    """Stacked bars of one model and base: without checkpoints left, with them right."""
    tables = [chosen(results, model, base, on) for on in (False, True)]
    keys = [key for key in ROWS if key in tables[0] and key[1] != 0.75]
    figure, (left, right) = new_figure(
        f"Memory of one training step: {NAMES[model]}, {BASES[base]}",
        f"One row of {TOKENS} tokens, rank {results['options']['rank']}, AdamW; counted, not "
        "measured on a GPU. “30 %” of the linear layers are trained: the last (next to the "
        "output),\nthe first, or scattered at random. The number at a bar is its whole length.",
        width=10, height=0.8 + 0.42 * len(keys) + 1.4, ncols=2, sharey=True,
        sharex=True,
    )  # fmt: skip
    for axes, rows, says in (
        (left, tables[0], "without gradient checkpointing"),
        (right, tables[1], "with gradient checkpointing"),
    ):
        _bars(axes, [rows[key] for key in keys])
        axes.set_title(says, fontsize=10.5, loc="left", color=INK, pad=18)
    names = left.set_yticks(range(len(keys)), [label(key) for key in keys])
    for tick, key in zip(names, keys, strict=True):
        tick.label1.set_fontweight("bold" if key[0] == OURS else "normal")
    left.invert_yaxis()
    handles, names = left.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9.5,
        handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
    save(figure, path)


def _bars(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    """A bar for each row, its parts one after the other, and lines at the sizes of cards."""
    stacks = [_stack(row) for row in rows]
    ends = [sum(stack.values()) for stack in stacks]
    begins = [0.0] * len(rows)
    for part, colour in (*PARTS, ("moment", SKY)):
        widths = [stack[part] for stack in stacks]
        axes.barh(
            range(len(rows)), widths, left=begins, color=colour, label=SAYS[part], height=0.72
        )
        begins = [b + w for b, w in zip(begins, widths, strict=True)]
    for at_row, end in enumerate(ends):
        axes.annotate(
            f"{end:.1f}", (end, at_row), (5, 0), textcoords="offset points", va="center",
            fontsize=9, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_xlim(0, max(max(ends) * 1.12, axes.get_xlim()[1]))
    for card in (c for c in CARDS_GB if c < axes.get_xlim()[1]):
        axes.axvline(card, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.9)
        axes.annotate(
            f"{card} GB", (card, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, color=FAINT, ha="center",
        )  # fmt: skip
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("GB (10⁹ bytes); dashed: the size of a card", fontsize=9.5, color=INK)


def _stack(row: Mapping[str, Any]) -> dict[str, float]:
    """Parts in GB that add up to the most that is alive."""
    parts = {key: row[key] for key in STANDING} | {"kept": at(row["kept"], TOKENS)}
    parts["weights"] += parts.pop("adapters")
    parts["moment"] = total(row, TOKENS) - sum(parts.values())
    return {key: count / GB for key, count in parts.items()}


LINES = (("top", BLUE), ("scattered", GREEN), ("bottom", ORANGE))


def by_share(results: Mapping[str, Any], model: str, base: str, path: Path) -> None:
    """The peak against the share of the layers that is open: ours, and PEFT on the same layers."""
    rows = chosen(results, model, base, False)
    figure, axes = new_figure(
        f"Memory of one training step, by what is trained: {NAMES[model]}, {BASES[base]}",
        f"Most memory of one training step, one row of {TOKENS} tokens, without gradient "
        "checkpointing; counted, not measured on a GPU.",
        width=9.6, height=5.4,
    )  # fmt: skip
    _peaks_by_share(axes, rows)
    _peaks_of_all(axes, rows)
    axes.set_xlim(0, 118)
    axes.set_ylim(0)
    axes.set_xticks([10, 30, 75, 100], ["10 %", "30 %", "75 %", "all"])
    axes.set_xlabel("linear layers that are trained", color=INK)
    axes.set_ylabel("GB (10⁹ bytes)", color=INK)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9,
        handlelength=3.2,
    )  # fmt: skip
    save(figure, path)


def _peaks_by_share(axes: Axes, rows: Mapping[tuple, Mapping[str, Any]]) -> None:
    """Draw a line for each place of the open layers: ours whole, PEFT's dashed."""
    for position, colour in LINES:
        for who, line in ((OURS, "-"), (RESTRICTED, (0, (4, 2)))):
            keys = sorted(k for k in rows if k[0] == who and k[2] == position)
            keys.append((OURS if who == OURS else "PEFT", 1.0, "all"))
            heights = [total(rows[key], TOKENS) / GB for key in keys]
            axes.plot(
                [key[1] * 100 for key in keys], heights, color=colour, linestyle=line, marker="o",
                markersize=4, linewidth=1.8,
                label=f"{'ours' if who == OURS else 'PEFT, same layers'}, {_where(position)}",
            )  # fmt: skip


def _peaks_of_all(axes: Axes, rows: Mapping[tuple, Mapping[str, Any]]) -> None:
    """Name the points of all layers, and draw the weights as a floor."""
    for key, says in (
        (("PEFT", 1.0, "all"), "PEFT"),
        ((PEFT_BF16, 1.0, "all"), "PEFT,\nbf16 adapters"),
        ((OURS, 1.0, "all"), "ours"),
    ):
        height = total(rows[key], TOKENS) / GB
        axes.plot([100], [height], "o", color=INK, markersize=5, zorder=3)
        axes.annotate(says, (100, height), (8, 0), textcoords="offset points", va="center")
    weights = rows[OURS, 1.0, "all"]["weights"] / GB
    axes.axhline(weights, color=GREY, linewidth=1)
    axes.annotate(
        "the frozen weights alone", (1, weights), (0, -4), textcoords="offset points",
        fontsize=9, color=FAINT, va="top",
    )  # fmt: skip


def _where(position: str) -> str:
    return {"top": "next to the output", "bottom": "next to the input"}.get(position, "scattered")

"""Draw masks and training runs as pictures that explain themselves.

The functions import matplotlib, which is an extra: training on a cluster does not need it.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ila.masks.mask import LayerMask
from ila.masks.names import BLOCK_NUMBER, KINDS, parse_module_name
from ila.reports.texts import baseline_run, gib_text, loss_text, ms_text, ratio_text
from ila.runs.atomic import write_bytes_atomic
from ila.runs.metrics import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_COLOURS = ("#2f6db3", "#d9822b", "#3a9a5b", "#b8434e", "#7b5ea7", "#7a5c43", "#c667a4", "#5f6b76")


NOT_DRAWN = "no picture was drawn: matplotlib is not installed, which the extra `figures` brings"


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def heatmap_figure(mask: LayerMask, *, title: str | None = None) -> "Figure":
    """Draw a mask as a grid: a row for each block, a column for each kind of layer.

    Colour is the score; a hatched cell is a closed layer. Block 0, next to the input, is lowest.

    Args:
        mask: Scores and gates to draw. Modules outside numbered blocks get a row of their own.
        title: Heading; by default it names the content.

    Returns:
        A figure outside matplotlib's global state.
    """
    from matplotlib.figure import Figure

    cells = _cells(mask.scores)
    blocks = sorted({block for block, _ in cells}, key=lambda b: -1 if b is None else b)
    kinds = sorted({kind for _, kind in cells}, key=_kind_order)
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for (block, kind), name in cells.items():
        grid[blocks.index(block), kinds.index(kind)] = mask.scores[name]

    longest = max(len(kind) for kind in kinds)
    column_inches = max(0.8, 0.085 * longest + 0.1) if len(kinds) <= 12 else 0.4
    height = 2.6 + min(24.0, max(1.6, 0.24 * len(blocks)))
    figure = Figure(figsize=(max(7.4, 2.4 + column_inches * len(kinds)), height))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    spread = mask.spread()
    pad = 0.0 if spread["max"] > spread["min"] else abs(spread["min"]) * 0.01 + 1e-9
    limits = {"vmin": spread["min"] - pad, "vmax": spread["max"] + pad}
    axes.set_facecolor("#ececec")
    image = axes.imshow(
        grid, aspect="auto", origin="lower", cmap="viridis", interpolation="none", **limits
    )
    closed = [cell for cell, name in cells.items() if not mask.gates[name]]
    _hatch(image, [(kinds.index(kind), blocks.index(block)) for block, kind in closed])
    _label_grid(axes, blocks, kinds)
    figure.colorbar(
        image, ax=axes, label="Score (higher matters more)", fraction=0.06, aspect=3 * height
    )
    figure.suptitle(title or "Importance of each linear layer", fontsize=14, parse_math=False)
    subtitle = (
        f"{len(mask.open)} of {len(mask)} layers open; scores {spread['min']:.3g} to "
        f"{spread['max']:.3g}, mean {spread['mean']:.3g}, standard deviation {spread['std']:.3g}"
    )
    axes.set_title(subtitle, fontsize=10, color="#444444")
    _explain_hatching(figure)
    return figure


def heatmap(mask: LayerMask, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Save ``heatmap_figure`` as a PNG, whole or not at all.

    Args:
        mask: Scores and gates to draw.
        path: PNG file to write.
        title: Heading; by default it names the content.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
    """
    return save_png(heatmap_figure(mask, title=title), path)


def draw_runs(runs: Sequence[Metrics]) -> "Figure":
    """Draw training runs: loss curves, and bars of the results and costs of each run.

    Args:
        runs: Results of ``load_run``, one or more.

    Returns:
        A figure outside matplotlib's global state.

    Raises:
        ValueError: No runs.
    """
    from matplotlib.figure import Figure

    baseline = baseline_run(runs)
    figure = Figure(figsize=(14, max(5.6, 2.6 + 0.62 * len(runs))))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.55))
    colours = list(itertools.islice(itertools.cycle(_COLOURS), len(runs)))
    _draw_losses(left.add_subplot(), runs, colours)
    panels = right.subplots(2, 2, sharey=True)
    for axes, (heading, show, number) in zip(panels.flat, _QUANTITIES, strict=True):
        values = [number(run) for run in runs]
        axes.set_title(heading, fontsize=11)
        _draw_bars(axes, values, number(baseline), show, colours)
    panels[0, 0].set_ylim(max(len(runs), 3) - 0.5, -0.5)  # shared: the first run is on top
    names = [_short(run["name"]) for run in runs]
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(runs)), names, parse_math=False)
        for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
            label.set(color=colour, fontweight="bold")
    panels[0, 0].set_xlabel(_losses_before(runs), color="#444444")
    figure.suptitle(
        f"Training runs (x: ratio to “{_short(baseline['name'])}”)",
        fontsize=14,
        parse_math=False,
    )
    return figure


def runs_figure(runs: Sequence[Metrics], path: str | os.PathLike[str]) -> Path:
    """Save ``draw_runs`` as a PNG, whole or not at all.

    Args:
        runs: Results of ``load_run``, one or more.
        path: PNG file to write.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
        ValueError: No runs.
    """
    return save_png(draw_runs(runs), path)


def _draw_losses(axes: "Axes", runs: Sequence[Metrics], colours: list[str]) -> None:
    for index, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        style = ("-", "--", ":")[index // len(_COLOURS) % 3]  # a colour's second use is dashed
        steps, losses = np.array(run["losses"], dtype=float).reshape(-1, 2).T
        axes.plot(steps, losses, color=colour, alpha=0.22, linewidth=1)
        axes.plot(steps, _smoothed(losses), style, color=colour, linewidth=2)
    axes.set(title="Training loss (bold: smoothed)", xlabel="Optimiser step", ylabel="Loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _losses_before(runs: Sequence[Metrics]) -> str:
    """Write the span of the held-out losses before training; nothing if none was measured."""
    before = [run["held_out_loss_before"] for run in runs]
    known = [loss for loss in before if loss is not None]
    if not known:
        return ""
    span = " to ".join(f"{loss:.3f}" for loss in sorted({min(known), max(known)}))
    return f"before training: {span}"


def _cells(names: Iterable[str]) -> dict[tuple[int | None, str], str]:
    """Map (block, column label) to a name; two modules never share a cell."""
    places = {name: parse_module_name(name) for name in names}
    templates = {}
    for name, parsed in places.items():
        parts = name.split(".")
        if parsed is not None:
            number = next(i for i, part in enumerate(parts) if BLOCK_NUMBER.fullmatch(part))
            parts[number] = "*"
        templates[name] = tuple(parts)
    labels = {}
    for template in set(templates.values()):
        others = set(templates.values()) - {template}
        lengths = range(1, len(template) + 1)
        unique = (n for n in lengths if all(other[-n:] != template[-n:] for other in others))
        labels[template] = ".".join(template[-next(unique, len(template)) :])
    return {
        (parsed[0] if parsed else None, labels[templates[name]]): name
        for name, parsed in places.items()
    }


def _hatch(image: "AxesImage", cells: list[tuple[int, int]]) -> None:
    """Hatch cells (column, row), white on dark colours and black on light ones."""
    from matplotlib.patches import Rectangle

    for column, row in cells:
        red, green, blue, _ = image.cmap(image.norm(image.get_array()[row, column]))
        dark = 0.30 * red + 0.59 * green + 0.11 * blue < 0.55
        corner = (column - 0.5, row - 0.5)
        style = {"edgecolor": "white" if dark else "black", "hatch": "////", "linewidth": 0}
        image.axes.add_patch(Rectangle(corner, 1, 1, fill=False, **style))


def _label_grid(axes: "Axes", blocks: list[int | None], kinds: list[str]) -> None:
    rotation = 0 if len(kinds) <= 12 else 90
    axes.set_xticks(range(len(kinds)), kinds, rotation=rotation, parse_math=False)
    step = 1 if len(blocks) <= 40 else 5
    rows = [row for row, block in enumerate(blocks) if block is None or block % step == 0]
    axes.set_yticks(rows, ["none" if blocks[row] is None else str(blocks[row]) for row in rows])
    axes.set_xticks(np.arange(len(kinds) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(blocks) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Kind of linear layer")
    axes.set_ylabel("Block (0 is next to the input)")


def _explain_hatching(figure: "Figure") -> None:
    from matplotlib.patches import Patch

    keys = [
        Patch(facecolor="#b8c4cc", label="open: adapted by training"),
        Patch(facecolor="#b8c4cc", edgecolor="black", hatch="////", label="closed: left frozen"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)


def _kind_order(kind: str) -> tuple[int, str]:
    last = kind.rsplit(".", 1)[-1]
    return (KINDS.index(last) if last in KINDS else len(KINDS), kind)


def _draw_bars(
    axes: "Axes",
    values: list[float | None],
    base: float | None,
    show: Callable[[float | None], str],
    colours: list[str],
) -> None:
    widths = [value or 0.0 for value in values]
    axes.barh(range(len(values)), widths, color=colours, height=0.62)
    for row, value in enumerate(values):
        text = show(value) + ratio_text(value, base)
        axes.annotate(text, (widths[row], row), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.6 * max(widths) or 1)  # room for the texts
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Return the mean over a window of a tenth of the run, narrower at both ends."""
    reach = max(1, len(losses) // 20)
    total = np.concatenate([[0.0], np.cumsum(losses)])
    places = np.arange(len(losses))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(losses))
    return (total[last] - total[first]) / (last - first)


def save_png(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes_atomic(path, buffer.getvalue())
    return Path(path)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:16]}…{name[-11:]}"


def _compact(count: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


_QUANTITIES = (
    ("Loss on held-out data after training", loss_text, lambda run: run["held_out_loss"]),
    (
        "Time per step, ms (median)",
        ms_text,
        lambda run: run["step_time_ms"]["median"],
    ),
    ("Peak memory, GiB", gib_text, lambda run: run["peak_memory_bytes"]),
    ("Trainable parameters", _compact, lambda run: run["trainable_parameters"]),
)

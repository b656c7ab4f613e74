"""Masks and training runs as pictures and tables, for people who did not make them.

matplotlib and rich are imported inside the functions: training on a cluster needs neither.
"""

import io
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ila.files import write_bytes_atomic
from ila.mask import BLOCK_NUMBER, LayerMask, chance_jaccard, parse_module_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FRACTIONS = (0.1, 0.3, 0.5, 0.75)
_COLOURS = ("#2f6db3", "#d9822b", "#3a9a5b", "#b8434e", "#7b5ea7", "#7a5c43", "#c667a4", "#5f6b76")


def heatmap_figure(mask: LayerMask, *, title: str | None = None) -> "Figure":
    """Draws a mask as a grid: a row for each block, a column for each kind of layer.

    Colour is the score; a hatched cell is a closed layer. Block 0, next to the input, is lowest.

    Args:
        mask: Scores and gates to draw. Modules outside numbered blocks get a row of their own.
        title: Heading; by default one that says what is shown.

    Returns:
        A figure that no global state of matplotlib knows of.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    cells = _place(mask.scores)
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
    for (block, kind), name in cells.items():
        if not mask.gates[name]:
            row, column = blocks.index(block), kinds.index(kind)
            red, green, blue, _ = image.cmap(image.norm(grid[row, column]))
            dark = 0.30 * red + 0.59 * green + 0.11 * blue < 0.55
            corner = (column - 0.5, row - 0.5)
            style = {"edgecolor": "white" if dark else "black", "hatch": "////", "linewidth": 0}
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, **style))

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
    figure.colorbar(
        image, ax=axes, label="Score (higher matters more)", fraction=0.06, aspect=3 * height
    )
    figure.suptitle(title or "Importance of each linear layer", fontsize=14, parse_math=False)
    subtitle = (
        f"{len(mask.open)} of {len(mask)} layers open; scores {spread['min']:.3g} to "
        f"{spread['max']:.3g}, mean {spread['mean']:.3g}, standard deviation {spread['std']:.3g}"
    )
    axes.set_title(subtitle, fontsize=10, color="#444444")
    keys = [
        Patch(facecolor="#b8c4cc", label="open: adapted by training"),
        Patch(facecolor="#b8c4cc", edgecolor="black", hatch="////", label="closed: left frozen"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    return figure


def heatmap(mask: LayerMask, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Saves `heatmap_figure` as a PNG, whole or not at all.

    Args:
        mask: Scores and gates to draw.
        path: PNG file to write.
        title: Heading; by default one that says what is shown.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The folder of `path` does not exist.
    """
    return _save_png(heatmap_figure(mask, title=title), path)


def compare_table(
    masks: Mapping[str, LayerMask], fractions: Sequence[float] = FRACTIONS
) -> list[dict[str, Any]]:
    """Compares every pair of masks: do they rank the layers alike, and choose the same ones?

    Args:
        masks: Label -> mask, two or more over the same modules.
        fractions: Shares p at which the best layers of both masks are compared.

    Returns:
        A row for each pair, JSON-able but for NaN: `a`, `b`, `modules`, `spearman` (NaN if a mask
        ranks nothing), and `top`, a list of `fraction`, `kept`, `jaccard`, `chance`.

    Raises:
        ValueError: Fewer than two masks, different modules, or a fraction outside (0, 1].

    >>> masks = {"one": LayerMask({"a": 1, "b": 2}), "two": LayerMask({"a": 3, "b": 4})}
    >>> row, = compare_table(masks, fractions=[0.5])
    >>> row["spearman"], row["top"]
    (1.0, [{'fraction': 0.5, 'kept': 1, 'jaccard': 1.0, 'chance': 0.3333333333333333}])
    """
    if len(masks) < 2:
        raise ValueError(f"masks must hold at least two masks to compare, got {len(masks)}")
    rows = []
    for (a, one), (b, other) in itertools.combinations(masks.items(), 2):
        try:
            rho = one.spearman(other)
        except ValueError as error:
            raise ValueError(f"masks {a!r} and {b!r} cannot be compared: {error}") from None
        row: dict[str, Any] = {"a": a, "b": b, "modules": len(one), "spearman": rho, "top": []}
        for p in fractions:
            mine, theirs = one.top(p), other.top(p)
            agreement = {"jaccard": mine.jaccard(theirs), "chance": chance_jaccard(p)}
            row["top"].append({"fraction": p, "kept": len(mine.open), **agreement})
        rows.append(row)
    return rows


def render_compare(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """Lays out the rows of `compare_table` for a terminal.

    Args:
        rows: What `compare_table` returned.

    Returns:
        A table to print with rich.
    """
    tops = rows[0]["top"] if rows else []
    header = ["Masks", "Rank correlation"]
    header += [f"Same in top {_percent(top['fraction'])}" for top in tops]
    body = []
    for row in rows:
        rho = "none" if math.isnan(row["spearman"]) else f"{row['spearman']:.2f}"
        cells = [f"{top['jaccard']:.2f} (chance {top['chance']:.2f})" for top in row["top"]]
        body.append([f"{row['a']} and {row['b']}", rho, *cells])
    caption = (
        "Rank correlation: Spearman's; 1 is the same order, 0 no relation, none that a mask has "
        "only equal scores.\nSame in top p: layers both choose / layers either chooses (Jaccard), "
        "beside what two random choices reach."
    )
    return _table("Agreement between masks", header, body, caption)


def load_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the measurements of a training run from `metrics.json`.

    Args:
        path: Folder of the run.

    Returns:
        The content of the file. `held_out_loss_before`, `held_out_loss` and `peak_memory_bytes` are
        None where they were not measured.

    Raises:
        ValueError: The file is missing, is not JSON, lacks keys, or holds values of the wrong type.
    """
    file = Path(path) / "metrics.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file; is this the folder of a training run?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON, or cut short: {error}") from None
    if not isinstance(run, dict):
        raise ValueError(f"{file}: must hold an object, got {type(run).__name__}")
    missing = [key for key in _RUN_KEYS if key not in run]
    if missing:
        raise ValueError(f"{file}: missing {', '.join(missing)}")
    for key, (expected, is_valid) in _RUN_KEYS.items():
        if not is_valid(run[key]):
            raise ValueError(f"{file}: {key} must be {expected}, got {run[key]!r:.80}")
    return run


def runs_table(runs: Sequence[Mapping[str, Any]]) -> "Table":
    """Lays out training runs for a terminal, each beside the first run with the most layers open.

    Args:
        runs: What `load_run` returned, one or more.

    Returns:
        A table to print with rich; `x` is the ratio to that run.

    Raises:
        ValueError: No runs.
    """
    header, body, caption = _runs_cells(runs)
    return _table("Training runs", header, body, caption)


def runs_markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of `runs_table` as Markdown.

    Args:
        runs: What `load_run` returned, one or more.

    Returns:
        Markdown that ends with a line break.

    Raises:
        ValueError: No runs.
    """
    header, body, caption = _runs_cells(runs)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    safe = [[" ".join(c.replace("|", "\\|").split()) for c in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in safe) + f"\n\n{caption}\n"


def draw_runs(runs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws training runs: loss curves, and bars for what each run reached and what it cost.

    Args:
        runs: What `load_run` returned, one or more.

    Returns:
        A figure that no global state of matplotlib knows of.

    Raises:
        ValueError: No runs.
    """
    from matplotlib.figure import Figure

    baseline = _baseline(runs)
    figure = Figure(figsize=(14, max(5.6, 2.6 + 0.62 * len(runs))))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.55))
    curves, colours = (
        left.add_subplot(),
        list(itertools.islice(itertools.cycle(_COLOURS), len(runs))),
    )
    for index, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        style = ("-", "--", ":")[index // len(_COLOURS) % 3]  # a colour's second use is dashed
        steps, losses = np.array(run["losses"], dtype=float).reshape(-1, 2).T
        curves.plot(steps, losses, color=colour, alpha=0.22, linewidth=1)
        curves.plot(steps, _smoothed(losses), style, color=colour, linewidth=2)
    curves.set(title="Training loss (bold: smoothed)", xlabel="Optimiser step", ylabel="Loss")
    curves.grid(alpha=0.25)
    curves.spines[["top", "right"]].set_visible(False)
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
    before = [run["held_out_loss_before"] for run in runs]
    known = [loss for loss in before if loss is not None]
    if known:
        span = " to ".join(f"{loss:.3f}" for loss in sorted({min(known), max(known)}))
        panels[0, 0].set_xlabel(f"before training: {span}", color="#444444")
    figure.suptitle(
        f"Training runs (x: ratio to “{_short(baseline['name'])}”)",
        fontsize=14,
        parse_math=False,
    )
    return figure


def runs_figure(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Saves `draw_runs` as a PNG, whole or not at all.

    Args:
        runs: What `load_run` returned, one or more.
        path: PNG file to write.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: The folder of `path` does not exist.
        ValueError: No runs.
    """
    return _save_png(draw_runs(runs), path)


def _place(names: Mapping[str, Any]) -> dict[tuple[int | None, str], str]:
    """(block, column label) -> name; two modules never share a cell."""
    found = {name: parse_module_name(name) for name in names}
    templates = {}
    for name, parsed in found.items():
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
        for name, parsed in found.items()
    }


def _kind_order(kind: str) -> tuple[int, str]:
    last = kind.rsplit(".", 1)[-1]
    return (KINDS.index(last) if last in KINDS else len(KINDS), kind)


def _baseline(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    return max(runs, key=lambda run: run["open_modules"])  # max returns the first of equals


def _ratio(value: float | None, base: float | None) -> str:
    return "" if value is None or not base else f" ({value / base:.2f}x)"


def _runs_cells(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], str]:
    base = _baseline(runs)
    body = []
    for run in runs:
        time, memory = run["step_time_ms"], run["peak_memory_bytes"]
        body.append(
            [
                run["name"],
                f"{run['open_modules']} of {run['total_modules']} ({run['fraction_open']:.0%})",
                f"{run['trainable_parameters']:,}"
                + _ratio(run["trainable_parameters"], base["trainable_parameters"]),
                f"{_loss(run['held_out_loss_before'])} → {_loss(run['held_out_loss'])}",
                f"{time['median']:.1f}"
                + _ratio(time["median"], base["step_time_ms"]["median"])
                + f" [{time['p10']:.1f}–{time['p90']:.1f}]",
                _gib(memory) + _ratio(memory, base["peak_memory_bytes"]),
            ]
        )
    header = ["Run", "Layers open", "Trainable parameters", "Held-out loss, before → after"]
    header += ["ms per step, median [p10–p90]", "Peak memory, GiB"]
    places = sorted({f"{run['device']}, {run['dtype']}" for run in runs})
    caption = f"x: ratio to “{base['name']}”. Measured on: {'; '.join(places)}."
    if len(places) > 1:
        caption += " Times and memory of different devices or types cannot be compared."
    return header, body, caption


def _table(title: str, header: list[str], body: list[list[str]], caption: str) -> "Table":
    from rich.table import Table
    from rich.text import Text  # plain strings would be read as markup: "[p10]", "[bold]"

    table = Table(title=title, caption=Text(caption), caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    return table


def _draw_bars(
    axes: "Axes", values: list[float | None], base: float | None, show: Any, colours: list[str]
) -> None:
    widths = [value or 0.0 for value in values]
    axes.barh(range(len(values)), widths, color=colours, height=0.62)
    for row, value in enumerate(values):
        text = show(value) + _ratio(value, base)
        axes.annotate(text, (widths[row], row), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.6 * max(widths) or 1)  # room for the texts
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Mean over a window of a tenth of the run, narrower at both ends."""
    reach = max(1, len(losses) // 20)
    total = np.concatenate([[0.0], np.cumsum(losses)])
    places = np.arange(len(losses))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(losses))
    return (total[last] - total[first]) / (last - first)


def _save_png(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes_atomic(path, buffer.getvalue())
    return Path(path)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:16]}…{name[-11:]}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _gib(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 2**30:.2f}"


def _compact(count: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_times(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_number(value.get(k)) for k in ("median", "p10", "p90")
    )


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in value
    )


_TEXT = ("a text", lambda value: isinstance(value, str))
_COUNT = ("an integer of 0 or more", _is_count)
_NUMBER = ("a finite number", _is_number)
_LOSS = ("a finite number or null", lambda value: value is None or _is_number(value))
_RUN_KEYS: dict[str, tuple[str, Any]] = {
    "name": _TEXT,
    "open_modules": _COUNT,
    "total_modules": _COUNT,
    "fraction_open": _NUMBER,
    "trainable_parameters": _COUNT,
    "steps": _COUNT,
    "held_out_loss_before": _LOSS,
    "held_out_loss": _LOSS,
    "step_time_ms": ("an object with the numbers median, p10 and p90", _are_times),
    "peak_memory_bytes": ("an integer or null", lambda value: value is None or _is_count(value)),
    "tokens_per_step": _NUMBER,
    "losses": ("a list of [step, loss]", _are_losses),
    "device": _TEXT,
    "dtype": _TEXT,
}
_QUANTITIES = (
    ("Loss on held-out data after training", _loss, lambda run: run["held_out_loss"]),
    (
        "Time per step, ms (median)",
        lambda ms: f"{ms:.1f}",
        lambda run: run["step_time_ms"]["median"],
    ),
    ("Peak memory, GiB", _gib, lambda run: run["peak_memory_bytes"]),
    ("Trainable parameters", _compact, lambda run: run["trainable_parameters"]),
)

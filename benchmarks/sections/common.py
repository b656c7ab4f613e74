"""What sections share: Markdown tables, and the look of the figures."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_MEASURED = "not measured"
GIB = 2**30
# Okabe and Ito's palette, darkened where it was too light for white paper: told apart by everyone.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072b2", "#d98000", "#009e73", "#c44601", "#b0619a"
SKY, GREY = "#56b4e9", "#8a8a8a"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY)
INK, FAINT = "#222222", "#666666"
DPI = 200  # twice what a page shows, so that a dense screen has pixels to use


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(name: str, says: str) -> str:
    """Show a figure of this section; ``says`` is for who cannot see it."""
    return f"![{says}](figures/{name})"


_PLACE = re.compile(r"(top|bottom) (\d+) ?%|(\d+) ?% (?:at the )?(top|bottom|scattered|learned)")
_PLACES = {"top": "last {} %", "bottom": "first {} %"}


def placed(name: str) -> str:
    """Name the layers of a contestant by place: the last ones are next to the output.

    Result files call them top, and the first ones bottom. A mask's top is its best layers, so pages
    and figures use other words.

    >>> placed("ours, 30% top"), placed("ours, 30 % at the bottom"), placed("below the top 30%")
    ('ours, last 30 %', 'ours, first 30 %', 'below the last 30 %')
    """

    def words(match: re.Match[str]) -> str:
        place, share = match[1] or match[4], match[2] or match[3]
        return _PLACES.get(place, f"{{}} % {place}").format(share)

    return _PLACE.sub(words, name)


def gib(count: float | None, digits: int = 1) -> str:
    """Bytes as GiB, or "not measured"."""
    return NOT_MEASURED if count is None else f"{count / GIB:.{digits}f} GiB"


def new_figure(
    title: str, subtitle: str = "", width: float = 8.0, height: float = 4.6, **grid: Any
) -> tuple[Figure, Any]:
    """A figure with its title in words above the axes.

    Args:
        title: What is shown, as a sentence or a phrase.
        subtitle: Under which conditions; a second, fainter line.
        width: Inches.
        height: Inches.
        **grid: Arguments of ``Figure.subplots``, for several axes.

    Returns:
        A figure that no global state of matplotlib knows of, and its axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    lines = 1 + subtitle.count("\n")
    room = 0.62 + 0.19 * lines if subtitle else 0.5
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - room / height))
    at = {"x": 0.1 / width, "ha": "left", "va": "top", "parse_math": False}
    figure.text(y=1 - 0.12 / height, s=title, fontsize=13, fontweight="bold", color=INK, **at)
    figure.text(y=1 - 0.42 / height, s=subtitle, fontsize=9.5, color=FAINT, **at)
    axes = figure.subplots(**grid)
    for one in [axes] if not hasattr(axes, "flat") else axes.flat:
        style(one)
    return figure, axes


def style(axes: Axes) -> None:
    """Thin lines, no box, a light grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(color="#bbbbbb", labelcolor=INK, labelsize=9.5)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG for usual and for dense screens; in 128 colours, for a third of the bytes."""
    from PIL import Image  # matplotlib's own dependency

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    image = Image.open(buffer).convert("RGB")
    image.quantize(128, method=Image.Quantize.MEDIANCUT).save(path, format="PNG", optimize=True)

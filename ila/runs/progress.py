"""One progress bar for every loop that takes a while: on stderr, so that stdout holds results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(
    items: Iterable[T],
    title: str,
    *,
    total: int | None = None,
    show: bool = True,
    transient: bool = False,
) -> Iterable[T]:
    """Yield the items and draw a bar on stderr.

    Args:
        items: Items of the loop.
        title: Text before the bar.
        total: Number of items, if ``items`` has no length.
        show: Whether to draw.
        transient: Whether the bar disappears at its end.
    """
    return track(
        items,
        title,
        total=total,
        console=Console(stderr=True),
        disable=not show,
        transient=transient,
    )

"""``ila select --top`` and ``--freeze``: cut a mask by a share of its layers; without torch."""

from __future__ import annotations

from pathlib import Path

from ila.masks.mask import LayerMask


def select(
    run: Path, *, top: float | None = None, freeze: float | None = None, out: Path | None = None
) -> tuple[LayerMask, Path]:
    """Cut a learned mask: keep the best ``top`` or freeze the worst ``freeze`` of the layers.

    Raises:
        ValueError: If both or none of the two are given, or the share is out of range.
    """
    if (top is None) == (freeze is None):
        raise ValueError("give exactly one of --top, --freeze and --budget")
    mask = LayerMask.load(run)
    cut = mask.top(top) if top is not None else mask.without_bottom(freeze)
    if out is None:
        folder = run if run.is_dir() else run.parent
        out = folder / (f"mask-top-{top}.json" if top is not None else f"mask-freeze-{freeze}.json")
    selection = {
        "top": None if top is None else float(top),
        "freeze": None if freeze is None else float(freeze),
    }
    cut = cut.with_provenance(selection=selection)
    cut.save(out)
    return cut, out

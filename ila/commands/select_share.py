"""A learned mask cut down to the layers to train; no torch, so that choosing takes no time."""

from __future__ import annotations

from pathlib import Path

from ila.masks.mask import LayerMask


def select(
    run: Path, *, top: float | None = None, freeze: float | None = None, out: Path | None = None
) -> tuple[LayerMask, Path]:
    """Cut a learned mask: keep the best ``top`` or freeze the worst ``freeze`` of the layers.

    Raises:
        ValueError: Unless exactly one of the two is given, within its range.
    """
    if (top is None) == (freeze is None):
        raise ValueError("give exactly one of --top, --freeze and --budget")
    mask = LayerMask.load(run)
    cut = mask.top(top) if top is not None else mask.without_bottom(freeze)
    if out is None:
        folder = run if run.is_dir() else run.parent
        out = folder / (f"mask-top-{top}.json" if top is not None else f"mask-freeze-{freeze}.json")
    chosen = {"top": top, "freeze": freeze}
    chosen = {name: None if share is None else float(share) for name, share in chosen.items()}
    provenance = {**mask.provenance, "selection": chosen}
    cut = LayerMask(cut.scores, cut.gates, provenance=provenance)
    cut.save(out)
    return cut, out

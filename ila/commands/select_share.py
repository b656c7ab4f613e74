"""``ila select --top`` and ``--freeze``: cut a mask by a share of its layers; without torch."""

from __future__ import annotations

from pathlib import Path

from ila.masks.checks import thawed
from ila.masks.mask import LayerMask
from ila.masks.objective import LAYERS, worth


def select(
    run: Path,
    *,
    top: float | None = None,
    freeze: float | None = None,
    out: Path | None = None,
    objective: str = LAYERS,
) -> tuple[LayerMask, Path]:
    """Cut a learned mask: keep the best ``top`` or freeze the worst ``freeze`` of the layers.

    Raises:
        ValueError: If both or none of the two are given, the share is out of range, or the
            objective (``ila.masks.objective``) is unknown.
    """
    if (top is None) == (freeze is None):
        raise ValueError("give exactly one of --top, --freeze and --budget")
    mask = LayerMask.load(run)
    by = worth(mask, objective)
    gates = (by.top(top) if top is not None else by.without_bottom(freeze)).gates
    cut = LayerMask(mask.scores, gates, thawed(mask.provenance))
    if out is None:
        folder = run if run.is_dir() else run.parent
        out = folder / (f"mask-top-{top}.json" if top is not None else f"mask-freeze-{freeze}.json")
    selection = {
        "top": None if top is None else float(top),
        "freeze": None if freeze is None else float(freeze),
    }
    if objective != LAYERS:
        selection["objective"] = objective
    cut = cut.with_provenance(selection=selection)
    cut.save(out)
    return cut, out

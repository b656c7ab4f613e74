"""Write the time of each part of one run, in sentences."""

from collections.abc import Mapping
from typing import Any


def phases_text(metrics: Mapping[str, Any]) -> str:
    """Write the time of each part of a run with a selection, beside the time of all layers.

    Args:
        metrics: Metrics of ``ila.search.one_run.train_and_select``.
    """
    selected = metrics["selected"]
    search, cache = selected["search"], metrics["prefix_cache"]
    cached = 0.0 if cache is None else cache["seconds"]
    first = search["steps"]
    rest = metrics["steps"] - first
    parts = [
        f"all {metrics['total_modules']} layers, {first} steps: {search['seconds']:.1f} s",
        f"scores and choice: {search['choosing_seconds']:.1f} s",
        *([] if cache is None else [f"cache of {cache['blocks']} blocks: {cached:.1f} s"]),
        f"{metrics['open_modules']} layers, {rest} steps: {selected['seconds']:.1f} s",
    ]
    whole = search["seconds"] + search["choosing_seconds"] + cached + selected["seconds"]
    expected = search["step_time_ms"]["median"] * metrics["steps"] / 1e3
    return (
        f"{'; '.join(parts)}\n"
        f"Together {whole:.1f} s. All layers for all {metrics['steps']} steps would have taken "
        f"{expected:.1f} s, by the median step before the switch: {whole / expected:.2f} of it"
    )

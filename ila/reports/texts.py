"""Write metrics of runs and the course of a search as short texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from ila.masks.mask import LayerMask
from ila.masks.provenance import Course, HeldOutLoss
from ila.runs.metrics import Metrics


def baseline_run(runs: Sequence[Metrics]) -> Metrics:
    """Return the run to compare the others with: the first with the most layers open."""
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    return max(runs, key=lambda run: run["open_modules"])  # max returns the first of equals


def ratio_text(value: float | None, base: float | None) -> str:
    """Write ``(0.50x)``, or nothing where one of the two is unknown."""
    return "" if value is None or not base else f" ({value / base:.2f}x)"


def loss_text(value: float | None) -> str:
    """Write a loss in nats with three decimals."""
    return "not measured" if value is None else f"{value:.3f}"


def ms_text(value: float) -> str:
    """Write milliseconds, with a decimal below a thousand."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def gib_text(value: int | None) -> str:
    """Write bytes in GiB with two decimals."""
    return "not measured" if value is None else f"{value / 2**30:.2f}"


def search_text(mask: LayerMask) -> str:
    """Describe the search that ``ila learn`` ran, a line for each stage."""
    search, held_out = mask.provenance["search"], mask.provenance["held_out_loss"]
    spread = search["spread"]
    scores = (
        f"Stage 2: {search['stage2']['steps']} steps; scores of {len(mask)} layers from "
        f"{spread['min']:.4g} to {spread['max']:.4g}, standard deviation {spread['std']:.3g}"
    )
    return f"{_course_text(search, held_out)}\n{scores}"


def _course_text(search: Mapping[str, Any], held_out: HeldOutLoss) -> str:
    course: Course = search["stage1"]
    if not course["steps"]:
        return f"No stage 1: method {search['config']['method']} needs none"
    return (
        f"Stage 1: {course['steps']} steps (stopped: {course['stopped']}), "
        f"training loss {course['first_window_loss']:.3f} → {course['last_window_loss']:.3f} "
        f"(means of the first and the last {course['loss_window']} steps), "
        f"held out {_loss_or_dash(held_out['before'])} → {_loss_or_dash(held_out['after_stage1'])}"
    )


def _loss_or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

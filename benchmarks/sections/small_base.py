"""A small base model with multi-head attention, on data sets that no choice was made on."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from benchmarks.frontier.methods import SMALL, SMALL_MLPS, best_by
from benchmarks.frontier.ways import FULL, NO_QK, Way
from benchmarks.sections.best_rate import by_shares
from benchmarks.sections.frontier_numbers import Frontier, Point
from benchmarks.sections.student import holm
from benchmarks.sections.study_claims import Claim
from benchmarks.sections.study_numbers import Estimate

PAGE = "study"
TITLE = "A base model of our own, and data that no choice was made on"
ORDER = 3
FILE = "small-base"
ENOUGH = 6  # pairs of data set and seed
LITTLE = 0.02  # of the gain
# Stated before any of these trainings ran: (sentence, way, the way it is held against, bound). The
# claim is that the way loses less of the gain than the other one plus the bound.
PATH, RANDOM = best_by("path", 0.3), best_by("random", 0.3)
STATED: tuple[tuple[str, Way, Way, float], ...] = (
    ("Leaving out every q and k loses less than 2 %", NO_QK, FULL, LITTLE),
    ("`path` at 75 % loses less than 2 %", best_by("path", 0.75), FULL, LITTLE),
    ("`path` at 30 % beats chance", PATH, RANDOM, 0.0),
    ("`path` at 10 % beats chance", best_by("path", 0.1), best_by("random", 0.1), 0.0),
    ("`kappa` at 30 % beats chance", best_by("kappa", 0.3), RANDOM, 0.0),
    ("`snr` at 30 % beats chance", best_by("snr", 0.3), RANDOM, 0.0),
    ("The MLPs of the last blocks beat chance", SMALL_MLPS, RANDOM, 0.0),
    ("`path` beats `kappa` at 30 %", PATH, best_by("kappa", 0.3), 0.0),
    ("`path` beats `update_norm` at 30 %", PATH, best_by("update_norm", 0.3), 0.0),
    ("`path` beats the scores of the other data set at 30 %", PATH, best_by("others", 0.3), 0.0),
    ("`path` beats the MLPs of the last blocks", PATH, SMALL_MLPS, 0.0),
)


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of the page."""
    if FILE not in results:
        return []
    found = Frontier(results[FILE])
    points = {point.way.name: point for point in found.points(SMALL)}
    parts = [_setting(found), "\n".join(claims(points)), _worst(results[FILE])]
    return [part for part in (*parts, *by_shares(points, SMALL_MLPS)) if part]


def claims(points: Mapping[str, Point]) -> list[str]:
    """Return the sentences that were stated before, each with its number and its verdict."""
    made = [_claim(points, *stated) for stated in STATED]
    able = [claim for claim in made if claim is not None and claim.whole]
    told = dict(zip(able, holm([claim.p for claim in able]), strict=True))
    return [
        f"- {stated[0]}: not measured."
        if claim is None
        else f"- {claim.sentence(told.get(claim, False))}"
        for stated, claim in zip(STATED, made, strict=True)
    ]


def _claim(
    points: Mapping[str, Point], text: str, way: Way, other: Way, bound: float
) -> Claim | None:
    """Return a claim about the gain that a way loses more than another one."""
    one, two = points.get(way.name), points.get(other.name)
    if one is None or two is None:
        return None
    cells = sorted(one.lost.keys() & two.lost.keys())
    behind = tuple(one.lost[cell] - two.lost[cell] for cell in cells)
    if not behind:
        return None
    said = Estimate.of(behind)
    number = f"{said.mean * 100:+.1f} %"
    if said.count > 1:
        number += f" ({said.low * 100:+.1f} … {said.high * 100:+.1f})"
    number += "" if other == FULL else " against it"
    return Claim(f"{text}: {number}", behind, bound, above=False, whole=len(cells) >= ENOUGH)


def _setting(found: Frontier) -> str:
    key = found.setting(SMALL)
    cells = {(key["data"], key["seed"]) for key, _ in found.lines["frontier"]}
    data = ", ".join(dict.fromkeys(name for name, _ in sorted(cells)))
    return (
        f"A Llama of 5.2 million parameters in 10 blocks, with as many key heads as query heads, "
        "pretrained by `python -m benchmarks.base` on stories, the three data sets above and half "
        f"of Python's standard library. Data: {data}; {len(cells)} pairs of data set and seed. "
        f"Recipe as above, {key['held_out']:.0%} of {key['limit']} rows held out. Ways, rates and "
        "the sentences below were fixed before any of these trainings ran. Numbers are shares of "
        "the gain lost, with 95 % intervals over the pairs, each for its sentence alone; a verdict "
        "needs all pairs and a p-value below 5 % after Holm's correction for the whole list."
    )


def _worst(lines: list[Mapping[str, Any]]) -> str:
    """Say how many of the worst layers are q or k: as many layers as there are q and k."""
    names = next(line["result"]["names"] for line in lines if line["kind"] == "layers")
    masks = [line for line in lines if line["kind"] == "mask" and line["key"]["method"] == "path"]
    few = [name for name in names if name.endswith(("q_proj", "k_proj"))]
    counts = []
    for mask in masks:
        scores = dict(zip(names, mask["result"]["scores"], strict=True))
        worst = sorted(scores, key=scores.__getitem__)[: len(few)]
        counts.append(len(set(worst) & set(few)))
    if not counts:
        return ""
    return (
        f"Of the {len(few)} layers with the lowest `path` scores, {fmean(counts):.1f} are q or k "
        f"({min(counts)} … {max(counts)} over {len(counts)} searches); chance would give "
        f"{len(few) ** 2 / len(names):.1f}."
    )

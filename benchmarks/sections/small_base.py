"""A small base model with multi-head attention, on two data sets that were not used before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.frontier.methods import SMALL, SMALL_MLPS, best_by
from benchmarks.frontier.ways import FULL, NO_QK, Way
from benchmarks.sections.best_rate import by_shares, worst
from benchmarks.sections.frontier_numbers import Frontier, Point
from benchmarks.sections.student import holm
from benchmarks.sections.study_claims import Claim
from benchmarks.sections.study_numbers import Estimate
from benchmarks.sections.verdict import LITTLE

PAGE = "study"
TITLE = "A base model of our own, and two data sets that were not used before"
ORDER = 3
FILE = "small-base"
CELLS = 6  # pairs of data set and seed
# Stated before any of these trainings ran: (sentence, way, the way it is held against, bound). The
# claim is that the way loses less of the gain than the other one plus the bound.
PATH, RANDOM = best_by("path", 0.3), best_by("random", 0.3)
STATED: tuple[tuple[str, Way, Way, float], ...] = (
    ("Leaving out every q and k loses less than 2 %", NO_QK, FULL, LITTLE),
    ("`path` at 75 % loses less than 2 %", best_by("path", 0.75), FULL, LITTLE),
    ("`path` at 30 % beats random layers", PATH, RANDOM, 0.0),
    ("`path` at 10 % beats random layers", best_by("path", 0.1), best_by("random", 0.1), 0.0),
    ("`kappa` at 30 % beats random layers", best_by("kappa", 0.3), RANDOM, 0.0),
    ("`snr` at 30 % beats random layers", best_by("snr", 0.3), RANDOM, 0.0),
    ("The MLPs of the last 7 blocks beat random layers", SMALL_MLPS, RANDOM, 0.0),
    ("`path` beats `kappa` at 30 %", PATH, best_by("kappa", 0.3), 0.0),
    ("`path` beats `update_norm` at 30 %", PATH, best_by("update_norm", 0.3), 0.0),
    ("`path` beats the scores of the other data set at 30 %", PATH, best_by("others", 0.3), 0.0),
    ("`path` at 30 % beats the MLPs of the last 7 blocks", PATH, SMALL_MLPS, 0.0),
)


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of the page."""
    if FILE not in results:
        return []
    found, ways = Frontier(results[FILE]), points(results)
    parts = [_setting(found), _ways(), "\n".join(claims(ways)), worst(found)]
    return [part for part in (*parts, *by_shares(ways, SMALL_MLPS)) if part]


def points(results: Mapping[str, Any]) -> dict[str, Point]:
    """Return name -> way; two data sets are few, so their pairs with seeds are the replicates."""
    if FILE not in results:
        return {}
    found = Frontier(results[FILE], by_pairs=True)
    return {point.way.name: point for point in found.points(SMALL)}


def claims(points: Mapping[str, Point]) -> list[str]:
    """Return the sentences that were stated before, each with its number and its verdict.

    Holm's correction counts every sentence; one that cannot be told yet has p = 1.
    """
    made = [_claim(points, *stated) for stated in STATED]
    told = holm([claim.p if claim and claim.whole else 1.0 for claim in made])
    return [
        f"- {stated[0]}: not measured."
        if claim is None
        else f"- {claim.sentence(verdict and claim.whole)}"
        for stated, claim, verdict in zip(STATED, made, told, strict=True)
    ]


def _claim(
    points: Mapping[str, Point], text: str, way: Way, other: Way, bound: float
) -> Claim | None:
    """Return a claim about the gain that a way loses more than another one.

    It is whole with every pair of data set and seed, and no best rate at the edge of those tried.
    """
    one, two = points.get(way.name), points.get(other.name)
    if one is None or two is None or not one.lost.keys() & two.lost.keys():
        return None
    behind = tuple(one.lost[cell] - two.lost[cell] for cell in sorted(one.lost) if cell in two.lost)
    said = Estimate.of(behind)
    which = "less" if said.mean < 0 else "more"
    number = f"{abs(said.mean) * 100:.1f} % {which} of the gain lost than with {_other(other)}"
    if said.count > 1:
        number += f" (difference {said.low * 100:+.1f} … {said.high * 100:+.1f})"
    whole = len(behind) == CELLS and not one.at_edge | two.at_edge
    return Claim(f"{text}: {number}", behind, bound, above=False, whole=whole)


def _other(way: Way) -> str:
    if way.scored_by is None:
        return way.name
    named = {"random": "random layers", "others": "those scores"}
    return named.get(way.scored_by, f"`{way.scored_by}`")


def _setting(found: Frontier) -> str:
    key = found.setting(SMALL)
    cells = {(key["data"], key["seed"]) for key, _ in found.lines["frontier"]}
    data = " and ".join(dict.fromkeys(f"*{name}*" for name, _ in sorted(cells)))
    return (
        "Is it the same on another model and other data? A Llama of 5.2 million parameters in 10 "
        "blocks, with as many key heads as query heads, read 4.3 million tokens once "
        "(`python -m benchmarks.base`): stories, the three data sets above and half of Python's "
        f"standard library. It is a weak model. Data: {data}, {len(cells)} pairs of data set and "
        "seed. *docstrings* are functions of the other half of the library with their docstrings; "
        "46 docstrings of 2,744 also stand in the half that was read. *rasbt* is a set of 1,100 "
        f"short instructions. The recipe is as above, with {key['held_out']:.0%} of "
        f"{key['limit']} rows held out."
    )


def _ways() -> str:
    return (
        "Ways, first rates and the sentences below were fixed before any of these trainings ran. "
        "Each way's best rate was found on the first seed of each data set. In brackets are 95 % "
        "intervals over the pairs, each for its sentence alone. A verdict needs all pairs, a best "
        "rate inside the range that was tried, and a p-value below 5 % after Holm's correction "
        "for the whole list; that rule was made stricter after the first trainings ran. The pairs "
        "are few and not independent: seeds share a data set, and `kappa` and `snr` choose the "
        "same layers for all of them. So a verdict is about these two data sets. Searches train "
        "at 1·10⁻³, below the best rates."
    )

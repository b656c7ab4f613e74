"""The claims, each a sentence with its number, its error and a verdict by a rule stated before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from benchmarks.sections.student import holm, p_value
from benchmarks.sections.study_numbers import Estimate, Study
from ila.masks.mask import LayerMask, chance_jaccard

HOLDS, FAILS, OPEN = "holds", "fails", "can't be told here"
ENOUGH = 3  # data sets
SEARCH, CHANCE = "path", "random"
HURT, NEAR = 0.02, 0.10  # of what training all layers gains
PAPER = 0.90  # overlap between data sets that the paper reports for the best 75 %
RULE = (
    "A loss is a share of what training all layers gains on the held-out rows. A data set is one "
    "replicate: the mean over its seeds. Intervals are 95 %, by Student's t over the data sets "
    "(overlaps: over their pairs), each for its claim alone. A verdict needs all runs of every "
    f"data set and seed, at least {ENOUGH} data sets, and a p-value below 5 % after Holm's "
    "correction for all claims of the "
    f"list that can be told: *holds* or *fails*; else *{OPEN}*. *Does not hurt* means losing less "
    f"than {HURT:.0%}, *comes near* less than {NEAR:.0%}; *beats* means a lower held-out loss. The "
    "default, `path`, was chosen on these sets; they say little about others."
)


@dataclass(frozen=True)
class Claim:
    """A claim about a mean over data sets.

    Attributes:
        text: Sentence without its verdict.
        values: One value for each data set.
        bound: The claim is that the mean lies on one side of this.
        above: Whether that side is above.
        whole: Whether every run of it was made.
    """

    text: str
    values: Sequence[float]
    bound: float
    above: bool
    whole: bool

    @property
    def is_able(self) -> bool:
        """Return whether enough was run for a verdict."""
        return self.whole and len(self.values) >= ENOUGH

    @property
    def p(self) -> float:
        """Return the p-value of the mean against the bound."""
        return p_value(self.values, self.bound)

    def sentence(self, told: bool) -> str:
        """Return the sentence with its verdict."""
        mean = sum(self.values) / len(self.values)
        verdict = OPEN
        if told:
            verdict = HOLDS if (mean > self.bound) == self.above else FAILS
        unfinished = "" if self.whole else "; runs are missing"
        return f"{self.text}{unfinished}: **{verdict}**."


def overlap(study: Study, method: str, share: float) -> str | None:
    """Describe the overlap between data sets beside chance and its ceiling, two seeds of one."""
    by_pair, chance = defaultdict(list), chance_jaccard(share)
    for _, result in study.agreed("data", method):
        by_pair[tuple(result["values"])].append(result["jaccard"][str(share)])
    same = [result["jaccard"][str(share)] for _, result in study.agreed("seed", method)]
    if not by_pair or not same:
        return None
    said = Estimate.of(sum(values) / len(values) for values in by_pair.values())
    ceiling = sum(same) / len(same)
    reach = highest_chance(len(study.layers), share)
    text = (
        f"Overlap of the best {share:.0%} between data sets, `{method}`: Jaccard {said.text(2)}; "
        f"chance {chance:.2f}, and 95 % of random pairs reach at most {reach:.2f}: "
        f"{'above' if said.low > reach else 'not surely above'} chance. Two seeds of one set, the "
        f"ceiling, reach {ceiling:.2f}"
    )
    if ceiling > reach:
        way = (said.mean - chance) / (ceiling - chance)
        text += f": that is {way:.2f} of the way from chance to the ceiling"
    if share == 0.75:
        inside = "inside" if said.low <= PAPER <= said.high else "outside"
        edge = min(abs(said.low - PAPER), abs(said.high - PAPER)) < 0.01
        where = "at the edge of" if edge else inside
        text += f". The paper's {PAPER:.2f} lies {where} the interval"
    return text + "."


def highest_chance(layers: int, share: float) -> float:
    """Return the Jaccard index that two random masks do not exceed in 95 % of all pairs.

    The layers in both follow the hypergeometric distribution.

    >>> round(highest_chance(210, 0.3), 2), round(highest_chance(35, 0.3), 2)
    (0.24, 0.38)
    """
    every = LayerMask({str(place): 0.0 for place in range(layers)})
    kept = len(every.top(share).open)
    total, below = comb(layers, kept), 0
    for both in range(kept + 1):
        below += comb(kept, both) * comb(layers - kept, kept - both)
        if below / total >= 0.95:
            return both / (2 * kept - both)
    return 1.0


def order(study: Study, method: str) -> str | None:
    """Describe the rank correlation between data sets, also corrected for the noise of a seed."""

    def mean(factor: str) -> float | None:
        found = [result["spearman"] for _, result in study.agreed(factor, method)]
        return sum(found) / len(found) if found else None

    sets, seeds = mean("data"), mean("seed")
    if sets is None or seeds is None or seeds <= 0:
        return None
    return (
        f"Rank correlation between data sets, `{method}`: ρ = {sets:.2f}; between two seeds of one "
        f"set {seeds:.2f}. Corrected for the noise of a single seed (their ratio): "
        f"{min(1.0, sets / seeds):.2f}."
    )


def losing_little(study: Study, method: str, share: float, bound: float, claim: str) -> list[Claim]:
    """Claim that a selection loses little against all layers."""
    lost = study.lost(method, "count", share)
    if not lost:
        return []
    values = study.by_data(lost)
    text = f"{claim}, `{method}`: loses {Estimate.of(values).text(3)} of the gain"
    return [Claim(text, values, bound, above=False, whole=study.is_whole(lost))]


def beats(study: Study, method: str, other: str, cut: str, share: float) -> list[Claim]:
    """Claim that a method beats another that was trained at the same cut."""
    behind = study.lost(other, cut, share, against=method)
    if not behind:
        return []
    values = study.by_data(behind)
    by = "by count" if cut == "count" else "of the parameters"
    text = (
        f"`{method}` beats `{other}` at {share:.0%} {by}: by {Estimate.of(values).text(3)} of the "
        "gain"
    )
    return [Claim(text, values, 0.0, above=True, whole=study.is_whole(behind))]


def duels(study: Study, cut: str, share: float) -> list[Claim]:
    """Claim that the search beats every other method, and every other method chance."""
    methods = dict.fromkeys(m for _, _, m, c, s in study.trained if (c, s) == (cut, share))
    pairs = [(SEARCH, other) for other in methods if other != SEARCH]
    pairs += [(method, CHANCE) for method in methods if method not in (SEARCH, CHANCE)]
    return [claim for pair in pairs for claim in beats(study, *pair, cut, share)]


def claims(study: Study) -> list[str]:
    """Return all sentences that the lines of a study allow."""
    described = [order(study, method) for method in (SEARCH, "ila")]
    described += [overlap(study, m, share) for m in (SEARCH, "ila") for share in (0.75, 0.3, 0.1)]
    sentences = [text for text in described if text]
    count = len({data for data, *_ in study.trained})
    if count < ENOUGH:
        return [*sentences, *([_too_few(count)] if count else [])]
    judged = _little(study)
    judged += [
        claim for cut, share in study.cuts() if share == 0.3 for claim in duels(study, cut, share)
    ]
    able = [claim for claim in judged if claim.is_able]
    told = dict(zip(map(id, able), holm([claim.p for claim in able]), strict=True))
    return [*sentences, *(claim.sentence(told.get(id(claim), False)) for claim in judged)]


def _little(study: Study) -> list[Claim]:
    found = []
    for method in (SEARCH, "ila"):
        freezing = "Freezing the worst 25 % of the layers does not hurt held-out loss"
        found += losing_little(study, method, 0.75, HURT, freezing)
        for share in (0.3, 0.1):
            text = f"Training the best {share:.0%} of the layers comes near all layers"
            found += losing_little(study, method, share, NEAR, text)
    return found


def _too_few(count: int) -> str:
    return (
        f"Trainings: on {count} data set{'s' if count > 1 else ''}, too few for a verdict: "
        f"**{OPEN}**."
    )

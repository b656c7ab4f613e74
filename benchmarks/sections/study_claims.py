"""The claims, each a sentence with its number, its error and a verdict by a rule stated before."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.sections.study_numbers import Estimate, Study
from ila.masks.mask import chance_jaccard

HOLDS, FAILS, OPEN = "holds", "fails", "can't be told here"
FAR = 0.5  # of the way from chance to identity
ENOUGH = 3  # two Jaccard overlaps can be equal by chance, and then seem to have no error
HURT, NEAR = 0.02, 0.10  # of what training all layers gains
RULE = (
    "Each verdict follows from a 95 % interval (Student's t): *holds* or *fails* if the whole "
    "interval lies on one side of the bound, *can't be told here* if it does not, or with fewer "
    f"than {ENOUGH} values. Overlap is *far above chance* beyond half of the way from chance to "
    "identity, averaged over pairs of data sets, one value a seed. *Does not hurt* means losing "
    f"less than {HURT:.0%}, *comes near* less than {NEAR:.0%}, of what training all layers gains "
    "on the held-out rows; one value for each data set and seed. *Beats* means a lower held-out "
    "loss for the same data set and seed. Intervals take these values for independent, are not "
    "corrected for how many there are, and speak of these data sets only."
)


def verdict(estimate: Estimate, bound: float, *, above: bool) -> str:
    """Decide whether an estimate lies above (or below) a bound."""
    if estimate.count < ENOUGH:
        return OPEN
    if estimate.low > bound:
        return HOLDS if above else FAILS
    if estimate.high < bound:
        return FAILS if above else HOLDS
    return OPEN


def overlap(study: Study, method: str, share: float) -> str | None:
    """Overlap between data sets beside chance, and between seeds of one set."""
    by_seed, chance = defaultdict(list), chance_jaccard(share)
    for of, result in study.agreed("data", method):
        by_seed[of["seed"]].append(result["jaccard"][str(share)])
    if not by_seed:
        return None
    overlaps = [sum(values) / len(values) for values in by_seed.values()]
    said = Estimate.of(overlaps)
    way = Estimate.of((x - chance) / (1 - chance) for x in overlaps)
    same = [result["jaccard"][str(share)] for _, result in study.agreed("seed", method)]
    seeds = f"; two seeds of one set: {sum(same) / len(same):.2f}" if same else ""
    return (
        f"Overlap of the best {share:.0%} between data sets is far above chance, `{method}`: "
        f"Jaccard {said.text(2)}, chance {chance:.2f}{seeds}: **{verdict(way, FAR, above=True)}**."
    )


def losing_little(study: Study, method: str, share: float, bound: float, claim: str) -> str | None:
    """A selection against all layers."""
    lost = study.lost_share(method, "count", share)
    if not lost:
        return None
    said, nats = Estimate.of(lost), Estimate.of(study.losing(method, "count", share))
    return (
        f"{claim}, `{method}`: loses {said.text(3)} of the gain of all layers, "
        f"{nats.mean:+.4f} nats: **{verdict(said, bound, above=False)}**."
    )


def beats(study: Study, method: str, cut: str, share: float) -> list[str]:
    """A method against every other that was trained at the same cut."""
    others = dict.fromkeys(m for _, _, m, c, s in study.trained if (c, s) == (cut, share))
    sentences = []
    for other in others:
        behind = study.losing(other, cut, share, against=method)
        if other != method and behind:
            said = Estimate.of(behind)
            by = "by count" if cut == "count" else "of the parameters"
            sentences.append(
                f"`{method}` beats `{other}` at {share:.0%} {by}: by {said.text(4, ' nats')}: "
                f"**{verdict(said, 0.0, above=True)}**."
            )
    return sentences


def claims(study: Study) -> list[str]:
    """All sentences that the lines of a study allow."""
    said = [overlap(study, m, share) for m in ("path", "ila") for share in (0.75, 0.3, 0.1)]
    for method in ("path", "ila"):
        said.append(
            losing_little(
                *(study, method, 0.75, HURT),
                "Freezing the worst 25 % of the layers does not hurt held-out loss",
            )
        )
        for share in (0.3, 0.1):
            text = f"Training the best {share:.0%} of the layers comes near all layers"
            said.append(losing_little(study, method, share, NEAR, text))
    sentences = [text for text in said if text]
    for cut, share in study.cuts():
        if share == 0.3:
            for method in ("path", "ila"):
                sentences += beats(study, method, cut, share)
    return sentences

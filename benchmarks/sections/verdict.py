"""Words for differences: better, worse, a tie, or not to be told."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.sections.student import holm
from benchmarks.sections.study_numbers import Estimate

LITTLE = 0.02  # of the gain: differences within this are ties
OPEN, TIE = "can't be told", "a tie"
RULE = (
    f"*A tie*: the interval of the difference lies within ±{LITTLE * 100:g} %. Otherwise *better* "
    "or *worse*: its p-value is below 5 % after Holm's correction within a list. Else it can't be "
    "told, which does not mean that both are equal: three data sets are few. Intervals and ties "
    "are not corrected."
)


def words(behind: Sequence[Estimate]) -> list[str]:
    """Return a word for each difference in the gain lost, corrected for how many there are.

    >>> words([Estimate.of([0.1, 0.11, 0.12]), Estimate.of([0.0, 0.001, 0.002])])
    ['worse', 'a tie']
    """
    told = holm([one.p() for one in behind])
    return [_word(one, sure) for one, sure in zip(behind, told, strict=True)]


def word(behind: Estimate) -> str:
    """Return the word for one difference."""
    return words([behind])[0]


def _word(behind: Estimate, told: bool) -> str:
    if -LITTLE < behind.low and behind.high < LITTLE:
        return TIE
    if told:
        return "worse" if behind.mean > 0 else "better"
    return OPEN

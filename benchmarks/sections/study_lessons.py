"""The masks of the study in five sentences, each from its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.sections.study_numbers import Estimate, Study, studies
from benchmarks.sections.verdict import word
from ila.masks.mask import chance_jaccard

PAGE = "study"
TITLE = "What the masks showed, at one learning rate"
ORDER = 3
METHOD = "path"
RANDOM, CHEAP, LAST = "random", "update_norm", "last"
SHARE = 0.3


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the sentences of the page."""
    study = largest(results)
    if study is None:
        return []
    return [
        _setting(study),
        _listed(lessons(study)),
        "All runs shared one learning rate, which favours many layers: fewer layers want a higher "
        "rate. Stage 1, scoring and training saw the same rows. The default, `path`, was chosen on "
        "these sets. Sums over the layers, tables and every single claim follow below.",
    ]


def largest(results: Mapping[str, Any]) -> Study | None:
    """Return the study that trained, of the model with the most layers."""
    trained = [study for study in studies(results).values() if study.trained]
    return max(trained, key=lambda study: len(study.layers), default=None)


def lessons(study: Study) -> list[str]:
    """Return the sentences that the lines of a study allow."""
    sentences = [_freezing(study), _selecting(study), _repeating(study), _cheap(study)]
    return [text for text in [*sentences, _by_place(study)] if text]


def _setting(study: Study) -> str:
    cells = {(data, seed) for data, seed, *_ in study.trained}
    return (
        f"{study.name}, {len(study.layers)} layers; data: {', '.join(study.data)}; {len(cells)} "
        f"pairs of data set and seed, {study.steps} steps at one learning rate, which favours many "
        "layers. A cost is a share of the loss that training all layers takes off, with its 95 % "
        f"interval over the {len(study.data)} data sets; the search is `path`, chosen on them."
    )


def _lost(study: Study, method: str, share: float) -> str | None:
    lost = study.lost(method, "count", share)
    if not lost:
        return None
    said = Estimate.of(study.by_data(lost))
    return f"{said.mean * 100:.1f} % ({said.low * 100:.1f} … {said.high * 100:.1f})"


def _freezing(study: Study) -> str | None:
    lost = _lost(study, METHOD, 0.75)
    values = study.lost(METHOD, "count", 0.75).values()
    if lost is None:
        return None
    worse = sum(value > 0 for value in values)
    return (
        f"Freezing the worst 25 % of the layers costs {lost}, and is worse than training all in "
        f"{worse} of {len(values)} pairs."
    )


def _selecting(study: Study) -> str | None:
    best, chance, few = (
        _lost(study, METHOD, SHARE),
        _lost(study, RANDOM, SHARE),
        _lost(study, METHOD, 0.1),
    )
    if best is None:
        return None
    others = [f"a random 30 % costs {chance}"] if chance else []
    others += [f"the best 10 % cost {few}"] if few else []
    return (
        f"Training the best 30 % alone costs {best}" + "".join(f"; {text}" for text in others) + "."
    )


def _repeating(study: Study) -> str | None:
    def mean(factor: str) -> float | None:
        pairs = [result["jaccard"][str(SHARE)] for _, result in study.agreed(factor, METHOD)]
        return sum(pairs) / len(pairs) if pairs else None

    seeds, sets = mean("seed"), mean("data")
    if seeds is None or sets is None:
        return None
    return (
        f"Two data sets share {sets:.2f} of their best 30 % (intersection over union); chance is "
        f"{chance_jaccard(SHARE):.2f}, and two seeds of one set, the ceiling, reach {seeds:.2f}."
    )


def _cheap(study: Study) -> str | None:
    behind = study.lost(CHEAP, "count", SHARE, against=METHOD)
    if not behind:
        return None
    values = study.by_data(behind)
    said = Estimate.of(values)
    which = "less" if said.mean < 0 else "more"
    return (
        f"Layers chosen by `{CHEAP}`, the size of the trained update, lose "
        f"{abs(said.mean) * 100:.1f} % {which} of the gain than those of the search at 30 % "
        f"(difference {said.low * 100:+.1f} … {said.high * 100:+.1f}): {word(said)} over "
        f"{len(values)} data sets; on the worst set {max(values) * 100:+.1f} %."
    )


def _by_place(study: Study) -> str | None:
    lost = _lost(study, LAST, SHARE)
    if lost is None:
        return None
    return f"The last 30 % of the layers, the cheapest to train, cost {lost} from scratch."


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(sentences, 1))

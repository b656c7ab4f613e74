"""Does the ranking repeat, and is it useful? Masks and trainings of ``benchmarks.study``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sections import study_figures
from benchmarks.sections.common import picture, table
from benchmarks.sections.study_claims import RULE, claims
from benchmarks.sections.study_numbers import ALL, Estimate, Study, studies
from benchmarks.study.agreement import halves
from ila.masks.mask import chance_jaccard

PAGE = "study"
TITLE = "Does the ranking repeat, and is it useful?"
_PLACES = ("first", "middle", "last")
_FACTORS = {
    "seed": "two seeds of one data set",
    "data": "two data sets, one seed",
    "milestone": "two milestones of one stage 1",
    "score_init": "two s₀",
    "score_lr": "two learning rates of s",
    "stage2_steps": "two lengths of stage 2",
}


def markdown(results: Mapping[str, Any]) -> list[str]:
    """The paragraphs of the page, of every study there is."""
    parts = []
    for stem, study in studies(results).items():
        parts += [f"### {study.name}", _setting(study), *_costs(study), *_agreements(study)]
        parts.append(picture(f"{stem}-heat.png", "scores by block and kind of module"))
        parts.append(picture(f"{stem}-agreement.png", "rank correlation of masks"))
        if study.trained:
            parts += _trainings(study)
        if study.cuts():
            parts.append(picture(f"{stem}-loss.png", "held-out loss against the layers open"))
        parts += ["**The claims.** " + RULE, "\n".join(f"- {text}" for text in claims(study))]
    return parts


def figures(results: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Heat maps, agreement and loss, of every study there is."""
    drawn: dict[str, Callable[[Path], None]] = {}
    for stem, study in studies(results).items():
        drawn[f"{stem}-heat.png"] = partial(study_figures.heat, study)
        drawn[f"{stem}-agreement.png"] = partial(study_figures.agreement, study)
        if study.cuts():
            drawn[f"{stem}-loss.png"] = partial(study_figures.loss, study)
    return drawn


def _setting(study: Study) -> str:
    key, usual = study.key, study.usual
    return (
        f"{len(study.layers)} layers; data sets: {', '.join(study.data)}; seeds: "
        f"{', '.join(map(str, study.seeds))}. Of {key['limit']} rows {key['held_out']:.0%} are "
        f"held out, cut at {key['max_length']} tokens; {key['batch_rows']} rows a step, rank "
        f"{key['rank']}, learning rate {key['learning_rate']:g}, "
        f"{key.get('stage1_steps', 'no')} steps of stage 1 and "
        f"{usual.get('stage2_steps', 'no')} of stage 2. Losses in nats per answer token. A seed "
        "draws the held-out rows, the adapter and the order of the data "
        "(`python -m benchmarks.study --help`)."
    )


def _costs(study: Study) -> list[str]:
    rows = []
    for method in study.methods:
        results = [r for (_, _, m), r in study.masks.items() if m == method]
        cost = [r["cost"] for r in results]
        spread = [r["spread"] for r in results]
        ratio = [s["std"] / abs(s["mean"]) for s in spread if s["mean"]]
        repeats = [halves(r["folds"]) for r in results]
        known = [r for r in repeats if r is not None]
        rows.append(
            [
                f"`{method}`",
                f"{cost[0]['stage1']['steps']} + {cost[0]['scores']['steps']}",
                f"{statistics.median(c['stage1']['seconds'] for c in cost):.0f} + "
                f"{statistics.median(c['scores']['seconds'] for c in cost):.0f}",
                f"{statistics.median(ratio):.2g}" if ratio else "none",
                f"{statistics.mean(known):.2f}" if known else "no batches",
            ]
        )
    header = ["method", "steps", "seconds", "spread", "ρ between halves"]
    return [
        "**What a ranking costs, and whether its scores separate.** Steps and seconds of stage 1 + "
        "of the scores, on a machine shared with other work; spread is the standard deviation over "
        "the layers by the mean; ρ is Spearman's between halves of the batches, over all halvings.",
        table(header, rows),
    ]


def _agreements(study: Study) -> list[str]:
    rows = []
    for factor, words in _FACTORS.items():
        for method in study.methods:
            agreed = [result for _, result in study.agreed(factor, method)]
            rho = [r["spearman"] for r in agreed if r["spearman"] is not None]
            # Places are the same in every mask, and a random draw is that of its seed.
            if not rho or method in _PLACES or (method == "random" and factor != "seed"):
                continue
            inside = [r["interval"] for r in agreed if r["interval"]]
            width = statistics.mean(high - low for low, high in inside) if inside else None
            rows.append(
                [
                    f"{words}, `{method}`",
                    f"{statistics.mean(rho):.2f} ({min(rho):.2f} … {max(rho):.2f})",
                    "none" if width is None else f"±{width / 2:.2f}",
                    *(_jaccard(agreed, share) for share in (0.1, 0.3, 0.5, 0.75, 0.9)),
                    str(len(rho)),
                ]
            )
    if not rows:
        return []
    chances = [f"{p:.0%} ({chance_jaccard(p):.2f})" for p in (0.1, 0.3, 0.5, 0.75, 0.9)]
    return [
        "**Agreement of masks that differ in one thing.** Spearman's ρ, mean (lowest … highest); "
        "half of its 95 % interval by drawing parts of the batches again; Jaccard overlap of the "
        "best layers, chance in brackets in the heading; number of pairs.",
        table(["masks of", "ρ", "by batches", *chances, "pairs"], rows),
    ]


def _jaccard(results: list[Mapping[str, Any]], share: float) -> str:
    return f"{statistics.mean(r['jaccard'][str(share)] for r in results):.2f}"


def _trainings(study: Study) -> list[str]:
    rows = []
    for cut, share in [("", 1.0), *study.cuts()]:
        of = {m: None for _, _, m, c, s in study.trained if (c, s) == (cut, share)}
        lines = []
        for method in of:
            results = [r for (_, _, *k), r in study.trained.items() if k == [method, cut, share]]
            sizes = statistics.mean(r["trainable_parameters"] for r in results)
            behind = study.by_data(study.losing(method, cut, share))
            word = "" if method == ALL else f", {share:.0%} by {cut}"
            row = [f"`{method}`{word}" if word else method, f"{sizes / 1e6:.3g} M"]
            row.append(f"{statistics.mean(r['held_out_loss'] for r in results):.4f}")
            said = Estimate.of(behind) if behind else None
            row.append(_behind(said) if word else "0")
            lines.append((said.mean if said else 0.0, [*row, str(len(results))]))
        rows += [row for _, row in sorted(lines, key=lambda line: line[0])]
    before = statistics.mean(study.losses.values())
    header = ["layers", "parameters", "held-out loss", "behind all layers (95 %)", "runs"]
    return [
        f"**Training from scratch on the layers kept, {study.steps} steps each**, best first. "
        f"Before training the loss is {before:.4f} on average. A cut by parameters keeps the best "
        "layers that fit into the share of all adapter parameters, so that large modules do not "
        "win by their size. Intervals are over the data sets. Compare only rows with the same "
        "number of runs; the claims below compare within the same data sets and seeds.",
        table(header, rows),
    ]


def _behind(said: Estimate | None) -> str:
    if said is None:
        return "all layers not trained"
    if said.count == 1:
        return f"{said.mean:+.4f}"
    return f"{said.mean:+.4f} ({said.low:+.4f} … {said.high:+.4f})"

"""The ways to choose few layers that are compared, each trained from scratch at its best rate.

Beside the methods of the search, controls that need none on the data at hand: the MLPs of the last
blocks, the singular values of the base weights, the mean scores of the other data sets, kind and
block alone, chance; and ``no q and k`` of ``ONE_PASS``. ``other-rows`` is ``path`` from a search
that shares no row with the training.
"""

from __future__ import annotations

from benchmarks.frontier.ways import EPOCHS, FULL, NO_QK, ONE_PASS, Way

SEARCHED = ("path", "gate_gradient", "update_norm", "ila")
# What LoRA-drop, PLoP and a gradient probe look at, at 30 % alone: ``docs/methods.md``.
RIVALS = ("output_norm", "feature_norm", "gradient_norm")
AFTER_A_RUN = (*SEARCHED, "other-rows", "output_norm")
CONTROLS = ("kappa", "snr", "others", "additive", "random")
SHARES = (0.3, 0.1, 0.75, 0.5)
# As many layers as 30 %: 63 of SmolLM2's 210 in 30 blocks, 21 of the small Llama's 70 in 10.
LAST_MLPS, SMALL_MLPS = (
    Way(f"MLPs of the last {blocks} blocks", opened=f"mlps:{blocks}") for blocks in (21, 7)
)
SMALL = "small base"
# Rates to begin with; rows that are seen again want a lower rate.
RATES = {
    "one pass": (1e-3, 2e-3, 3e-3),
    "epochs": (2e-4, 5e-4, 1e-3),
    SMALL: (1e-3, 2e-3, 3e-3, 5e-3),
}


def best_by(method: str, share: float) -> Way:
    """Return the way that trains the best layers by a method, from scratch.

    One that stands in ``ONE_PASS`` is that one: it is trained once.
    """
    kind, search = "top" if method == "path" else method, method in AFTER_A_RUN
    way = Way(f"best {share * 100:g} % by `{method}`", opened=f"{kind}:{share:g}", search=search)
    return next((known for known in ONE_PASS if known.key() == way.key()), way)


def by_share(share: float) -> list[Way]:
    """Return the ways that open this share of the layers by their scores.

    ``additive`` is asked at 30 % alone.
    """
    methods = (*SEARCHED, *CONTROLS)
    return [best_by(method, share) for method in methods if method != "additive" or share == 0.3]


OTHER_ROWS = best_by("other-rows", 0.3)
SCORED = tuple(way for share in SHARES for way in by_share(share))
NAMED = tuple(best_by(method, 0.3) for method in RIVALS)
METHODS = (LAST_MLPS, OTHER_ROWS, *NAMED, *(way for way in SCORED if way not in ONE_PASS))
SMALL_BASE = (FULL, NO_QK, SMALL_MLPS, *SCORED)
PARTS = {"one pass": (*ONE_PASS, *METHODS), "epochs": EPOCHS, SMALL: SMALL_BASE}

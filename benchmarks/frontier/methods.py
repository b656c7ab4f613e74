"""The ways to choose few layers that are compared, each trained from scratch at its best rate.

Beside the methods of the search, controls that need none on the data at hand: the MLPs of the last
blocks, the singular values of the base weights, the mean scores of the other data sets, chance; and
``no q and k`` of ``ONE_PASS``.
"""

from __future__ import annotations

from benchmarks.frontier.ways import EPOCHS, ONE_PASS, Way

SEARCHED = ("path", "gate_gradient", "update_norm", "ila")
CONTROLS = ("kappa", "snr", "others", "random")
SHARES = (0.3, 0.1, 0.75, 0.5)
# SmolLM2 has 210 layers in 30 blocks: these are 63 of them.
LAST_MLPS = Way("MLPs of the last 21 blocks", opened="mlps:21")


def best_by(method: str, share: float) -> Way:
    """Return the way that trains the best layers by a method, from scratch.

    One that stands in ``ONE_PASS`` is that one: it is trained once.
    """
    kind, search = "top" if method == "path" else method, method in SEARCHED
    way = Way(f"best {share * 100:g} % by `{method}`", opened=f"{kind}:{share:g}", search=search)
    return next((known for known in ONE_PASS if known.key() == way.key()), way)


def by_share(share: float) -> list[Way]:
    """Return the ways that open this share of the layers."""
    scored = [best_by(method, share) for method in (*SEARCHED, *CONTROLS)]
    return [LAST_MLPS, *scored] if share == 0.3 else scored


METHODS = tuple(way for share in SHARES for way in by_share(share) if way not in ONE_PASS)
PARTS = {"one pass": (*ONE_PASS, *METHODS), "epochs": EPOCHS}

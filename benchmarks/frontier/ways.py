"""The ways to train that the frontier compares, and what each of them costs in steps.

A way is a share of the steps of a full run, a set of open layers and, for one run with a selection,
the time of its switch. Total time is counted from steps and measured step times:

    all layers        n · all
    from scratch      n · open
    one run           k · all + scoring + cache + (n − k) · open
    two runs          m · all + scoring + n · open
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ila.masks.mask import LayerMask
from ila.masks.rules import chosen_by
from ila.price.choice import Choice
from ila.search.spectra import SPECTRA

ALL = "all layers"
_QK = re.compile(r"\.(q|k)_proj$")


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: Name in tables.
        share: Steps, as a share of the steps of a full run.
        opened: Layers that train from the switch on, or from the start: ``"all"``, ``"blocks:N"``,
            ``"no-qk"``, ``"mlps:N"`` (the MLPs of the last N blocks), ``"top:SHARE"`` (by ``path``
            scores), ``"others:SHARE"`` (by the mean ``path`` scores of the other data sets),
            ``"additive:SHARE"`` (by these, as kind and block alone explain them),
            ``"other-rows:SHARE"`` (by a search on further rows of the set), or ``"METHOD:SHARE"``
            with another method of the search, of ``ila.baselines``, or ``snr`` and ``kappa`` (by
            the singular values of the base weights).
        at: Time of the switch as a share of the run's own steps; None trains from scratch.
        search: Whether a run before this one makes the scores.
    """

    name: str
    share: float = 1.0
    opened: str = "all"
    at: float | None = None
    search: bool = False

    def steps(self, full: int) -> int:
        """Return the steps of this way.

        >>> Way("half as long", share=0.5).steps(60)
        30
        """
        return max(1, round(self.share * full))

    def key(self) -> dict[str, object]:
        """Return what decides the result of a training."""
        return {"share": self.share, "opened": self.opened, "at": self.at, "search": self.search}

    def choice(self) -> Choice:
        """Return the choice of one run."""
        kind, _, value = self.opened.partition(":")
        return Choice(blocks=int(value)) if kind == "blocks" else Choice(top=float(value))

    @property
    def scored_by(self) -> str | None:
        """The method whose scores choose the layers; None where their names do.

        >>> Way("", opened="top:0.3").scored_by, Way("", opened="mlps:21").scored_by
        ('path', None)
        """
        kind = self.opened.partition(":")[0]
        if kind in ("all", "blocks", "no-qk", "mlps"):
            return None
        return "path" if kind == "top" else kind

    @property
    def by_weights(self) -> str | None:
        """The method that scores the layers from the base weights alone, if one does."""
        kind = self.opened.partition(":")[0]
        return kind if kind in SPECTRA else None

    def mask(self, names: Sequence[str], scores: Sequence[float] | None = None) -> LayerMask:
        """Return the mask of a training from scratch.

        >>> Way("", opened="no-qk").mask(["layers.0.q_proj", "layers.0.v_proj"]).open
        ('layers.0.v_proj',)
        """
        scored = (
            dict.fromkeys(names, 0.0) if scores is None else dict(zip(names, scores, strict=True))
        )
        if self.opened == "no-qk":
            return LayerMask(scored, {name: not _QK.search(name) for name in names})
        if self.opened.startswith("mlps:"):
            opened = set(chosen_by(f"last-{self.opened}", names))
            return LayerMask(scored, {name: name in opened for name in names})
        return self.choice().cut(scored)


FULL = Way(ALL)
NO_QK = Way("no q and k", opened="no-qk")
# In the order in which they are trained: what decides comes first.
ONE_PASS = (
    FULL,
    Way("one run, last half of the blocks", opened="blocks:15", at=0.25),
    Way(f"{ALL}, 0.8 of the steps", share=0.8),
    Way("one run, last 18 blocks", opened="blocks:18", at=0.25),
    NO_QK,
    Way("last half of the blocks", opened="blocks:15"),
    Way("two runs, best 30 %", opened="top:0.3", search=True),
    Way("no q and k, 0.9 of the steps", share=0.9, opened="no-qk"),
    Way("one run, last 22 blocks", opened="blocks:22", at=0.25),
    Way(f"{ALL}, 0.87 of the steps", share=0.87),
    Way("best 30 % by `kappa`", opened="kappa:0.3"),
    Way("best 30 % by `snr`", opened="snr:0.3"),
    Way("one run, best 30 %", opened="top:0.3", at=0.25),
    Way(f"{ALL}, 0.6 of the steps", share=0.6),
    Way("one run, last 9 blocks", opened="blocks:9", at=0.25),
    Way("one run, last half from the middle on", opened="blocks:15", at=0.5),
)
EPOCHS = (
    FULL,
    Way("one run, last half of the blocks", opened="blocks:15", at=0.25),
    Way(f"{ALL}, 0.75 of the steps", share=0.75),
    Way("one run, last half, 0.85 of the steps", share=0.85, opened="blocks:15", at=0.25),
    Way(f"{ALL}, 0.6 of the steps", share=0.6),
    Way("one run, last 12 blocks", opened="blocks:12", at=0.25),
    Way("one run, last 9 blocks", opened="blocks:9", at=0.25),
    Way("last half of the blocks", opened="blocks:15"),
)

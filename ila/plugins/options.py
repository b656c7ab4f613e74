"""Options of a run of another tool, from keys of its configuration: ``ila_mask``, ``ila_top`` …"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches

from transformers import TrainerCallback

from ila.masks.objective import LAYERS
from ila.plugins.take_over import TakeOver
from ila.search.select_layers import SelectLayers

PREFIX = "ila_"
_CHOICE = ("top", "freeze", "blocks", "budget")


@dataclass(frozen=True)
class PluginOptions:
    """Options of ``ila train`` that make sense inside another tool; none given opens all layers.

    Attributes:
        mask: Mask file with the open layers.
        closed: Way to close the others, ``"drop"`` or ``"keep"``.
        select_at: Share or number of steps after which the run selects its layers.
        top: Share of layers that stay open; one of ``top``, ``freeze``, ``blocks`` and ``budget``.
        freeze: Share of layers that close.
        blocks: Number of last blocks that stay open.
        budget: Most that the open layers may cost.
        speed: Rates for a budget of time.
        objective: Worth of a set of layers, ``"layers"`` or ``"blocks"``.
        score: Method that scores, ``"gate_gradient"`` or ``"path"``.
        lean_head: Whether to compute the loss by ``ila.lean_head``.
    """

    mask: str | None = None
    closed: str | None = None
    select_at: float | int | None = None
    top: float | None = None
    freeze: float | None = None
    blocks: int | None = None
    budget: str | None = None
    speed: str | None = None
    objective: str | None = None
    score: str | None = None
    lean_head: bool | None = None

    def __post_init__(self) -> None:
        for name in ("select_at", "top", "freeze"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(f"{PREFIX}{name} must be a number, got {value!r}")
        beside = (*_CHOICE, "speed", "objective", "score")
        asked = [name for name in beside if getattr(self, name) is not None]
        if self.select_at is None and asked:
            raise ValueError(
                f"{PREFIX}{asked[0]} selects in the middle of a run; give {PREFIX}select_at too"
            )
        if self.select_at is not None and self.mask is not None:
            raise ValueError(f"{PREFIX}select_at selects layers itself; leave out {PREFIX}mask")
        if self.closed is not None and self.mask is None and self.select_at is None:
            raise ValueError(f"{PREFIX}closed says how layers close; give {PREFIX}mask")
        self.callbacks()  # raises before a large model loads

    @classmethod
    def read(cls, config: Mapping[str, object]) -> PluginOptions:
        """Read the keys with our prefix; all other keys are the tool's.

        Raises:
            ValueError: If a key of ours is unknown, or values do not fit.

        >>> PluginOptions.read({"learning_rate": 1e-4, "ila_select_at": 0.25, "ila_top": 0.3}).top
        0.3
        """
        known = [PREFIX + field.name for field in fields(cls)]
        mine = {key: config[key] for key in config if str(key).startswith(PREFIX)}
        for key in mine:
            if key not in known:
                close = get_close_matches(key, known, 1)
                hint = f"; {close[0]} is close to it" if close else ""
                raise ValueError(f"{key} is no option; known are {', '.join(known)}{hint}")
        return cls(**{key.removeprefix(PREFIX): value for key, value in mine.items()})

    def take_over(self) -> TakeOver:
        """Make the callback that prepares the model."""
        closed = "drop" if self.mask is None or self.closed is None else self.closed
        return TakeOver(self.mask, closed, bool(self.lean_head))

    def callbacks(self) -> list[TrainerCallback]:
        """Make the callback of a selection; none without one."""
        if self.select_at is None:
            return []
        choice = {name: getattr(self, name) for name in (*_CHOICE, "speed")}
        how = {"closed": self.closed, "method": self.score}
        how = {name: value for name, value in how.items() if value is not None}
        return [SelectLayers(self.select_at, objective=self.objective or LAYERS, **choice, **how)]

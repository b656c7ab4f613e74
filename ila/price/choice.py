"""Choose the layers that stay open: a share by score, the best for a budget, or the last blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ila.masks.mask import LayerMask
from ila.masks.names import parse_module_name
from ila.masks.objective import LAYERS, check_objective, worth
from ila.price.budget import TIME, Budget, Spending
from ila.price.shapes import Shape
from ila.price.speed import Speed

_WAYS = ("top", "freeze", "budget", "blocks")


@dataclass(frozen=True)
class Choice:
    """A way to choose layers; exactly one of the first four fields is given.

    Attributes:
        top: Share of layers that stay open, the best.
        freeze: Share of layers that close, the worst.
        budget: Most that open layers may cost: ``"time=0.6"``, ``"memory=12GiB"`` or
            ``"parameters=1M"``.
        blocks: Number of last blocks that stay open whole: ``15`` or ``"last:15"``. It
            ignores the scores.
        speed: File of ``ila measure`` or name of a known GPU, for a budget of time.
        objective: Worth of a set: ``"layers"``, the sum of its scores, or ``"blocks"``, with
            diminishing returns in each block (``ila.masks.objective``).

    >>> Choice(blocks="last:1").cut({"layers.0.q_proj": 3.0, "layers.1.q_proj": 1.0}).open
    ('layers.1.q_proj',)
    """

    top: float | None = None
    freeze: float | None = None
    budget: str | None = None
    blocks: int | str | None = None
    speed: str | None = None
    objective: str = LAYERS

    def __post_init__(self) -> None:
        given = [name for name in _WAYS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(_WAYS)} must be given, got {given}")
        check_objective(self.objective)
        if self.blocks is not None and self.objective != LAYERS:
            raise ValueError("objective does nothing with blocks: they ignore the scores")
        probe = LayerMask({"a": 0.0, "b": 0.0})
        if self.top is not None:
            probe.top(self.top)
        if self.freeze is not None and not 0 < self.freeze < 1:
            raise ValueError(f"freeze must be in (0, 1), got {self.freeze}")
        if self.blocks is not None:
            _last(self.blocks)
        timed = self.budget is not None and Budget.parse(self.budget).resource == TIME
        if timed and self.speed is None:
            raise ValueError(
                "budget time needs speed: a file of `ila measure`, or the name of a GPU such as "
                "'NVIDIA H100 80GB HBM3'"
            )
        if self.speed is not None and not timed:
            raise ValueError("speed does nothing without a budget of time")

    def as_dict(self) -> dict[str, float | int | str]:
        """Return the given fields, for JSON."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.objective == LAYERS:
            del given["objective"]  # runs of older versions have no such field
        return given

    def cut(self, scores: Mapping[str, float], shape: Shape | None = None) -> LayerMask:
        """Choose by scores.

        Args:
            scores: Module name -> importance, of every layer.
            shape: Sizes of model and step; a budget needs it.

        Returns:
            A mask with these scores.

        Raises:
            ValueError: If the choice closes every layer, the model has fewer blocks, or a budget
                has no ``shape``.
        """
        mask = worth(LayerMask(scores), self.objective)
        if self.top is not None:
            return LayerMask(scores, mask.top(self.top).gates)
        if self.freeze is not None:
            return LayerMask(scores, mask.without_bottom(self.freeze).gates)
        if self.blocks is not None:
            return LayerMask(scores, _in_last_blocks(scores, _last(self.blocks)))
        if shape is None:
            raise ValueError("shape must be given to choose by a budget")
        point = Spending(mask, Budget.parse(self.budget), shape, _rates(self.speed)).chosen()
        return LayerMask(scores, {name: name in point.opened for name in scores})


def _rates(speed: str | None) -> Speed | str | None:
    is_file = speed is not None and (speed.endswith(".json") or Path(speed).exists())
    return Speed.load(Path(speed)) if is_file else speed


def _last(blocks: int | str) -> int:
    """Read ``15`` or ``"last:15"``."""
    text = str(blocks).removeprefix("last:")
    if isinstance(blocks, bool) or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"blocks must be a number ≥ 1 or like 'last:15', got {blocks!r}")
    return int(text)


def _in_last_blocks(scores: Mapping[str, float], count: int) -> dict[str, bool]:
    """Tell which modules are in the last ``count`` blocks; a head comes after all blocks."""
    places = {name: parse_module_name(name) for name in scores}
    numbers = sorted({place[0] for place in places.values() if place is not None})
    if len(numbers) < count:
        raise ValueError(f"blocks must be at most {len(numbers)}, got {count}")
    lowest = numbers[-count]
    return {name: place is None or place[0] >= lowest for name, place in places.items()}

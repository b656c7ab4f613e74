"""Reports of the edits of a model: which modules changed, and why others did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ila.models.targets import NOTHING_OUTSIDE, Outside


@dataclass(frozen=True)
class ConversionReport:
    """Changes of ``convert`` or ``restore``: swapped modules, and name -> reason for the others.

    ``mlps`` names the gated MLPs that became lean, or plain again. ``attentions`` names the
    blocks whose q, k and v now share their x (two of them must have adapters), or no longer do.
    ``left`` also holds unchanged blocks. ``head`` tells whether a lean head was undone.
    """

    swapped: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    mlps: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    head: bool = False

    def __str__(self) -> str:
        blocks = f", {len(self.mlps)} gated MLPs" if self.mlps else ""
        blocks += f", {len(self.attentions)} attention blocks" if self.attentions else ""
        blocks += ", the head" if self.head else ""
        lines = [f"{len(self.swapped)} layers swapped{blocks}, {len(self.left)} left"]
        first: dict[str, str] = {}
        for name, reason in self.left.items():
            first.setdefault(reason, name)
        counts = Counter(self.left.values())
        for reason, count in counts.items():
            others = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"  left {first[reason]}{others}: {reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class MaskReport:
    """Result of ``apply_mask``: the adapter, and the names of its open and closed layers.

    ``closing`` tells whether closed layers dropped their adapters or keep them frozen. ``outside``
    counts the trained parameters that no mask reaches.
    """

    adapter: str
    open: tuple[str, ...]
    closed: tuple[str, ...]
    closing: str = "drop"
    outside: Outside = NOTHING_OUTSIDE

    def __str__(self) -> str:
        total = len(self.open) + len(self.closed)
        kept = ", the others keep what they learned" if self.closing == "keep" else ""
        text = f"adapter {self.adapter!r}: {len(self.open)} of {total} layers open{kept}"
        return f"{text}; {self.outside}" if self.outside.parameters else text

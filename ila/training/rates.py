"""The learning rate by default."""

from __future__ import annotations

import math

ADAPTER_RATE, FULL_RATE = 2e-4, 2e-5
# The exponent that doubles the rate at 30 % of the layers, and the most it may multiply by.
_EXPONENT, _MOST = math.log(2.0) / math.log(1.0 / 0.3), 3.0


def usual_rate(share: float = 1.0, full: bool = False) -> float:
    """Return the usual peak learning rate of a training from scratch.

        rate = 2e-4 · min(3, share⁻⁰·⁵⁸)

    Fewer layers want a higher rate, because they have to move as far as all layers together. On
    SmolLM2-135M (rank 8, rates of 1, 2 and 3 times the usual, five pairs of data set and seed) the
    best 30 % lost 5.6 % of the gain of all layers at one rate for both, and 0.7 % at each one's
    best, about twice as high. Between 30 % and all a power law is the simplest curve through both;
    below 15 % nothing was measured, and the rate rises no more.

    Args:
        share: Share of the layers that are open, in (0, 1].
        full: Whether the layers' own weights train; their rate was not measured by share, and stays
            2e-5.

    Raises:
        ValueError: If ``share`` is not in (0, 1].

    >>> usual_rate(), round(usual_rate(0.3), 7), round(usual_rate(0.05), 7)
    (0.0002, 0.0004, 0.0006)
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if full:
        return FULL_RATE
    return ADAPTER_RATE * min(_MOST, share**-_EXPONENT)

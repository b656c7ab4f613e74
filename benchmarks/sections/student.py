"""Student's t: p-values of a mean against a bound, and Holm's correction for many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_STEPS = 20_001


def p_value(values: Sequence[float], bound: float) -> float:
    """Return the two-sided p-value of the mean of values against a bound; 1 for one value.

    >>> round(p_value([1.0, 2.0, 3.0], 0.0), 4)  # t = 3.4641 with 2 degrees of freedom
    0.0742
    """
    count = len(values)
    if count < 2:
        return 1.0
    mean = sum(values) / count
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
    return p_of(mean - bound, deviation / math.sqrt(count), count)


def p_of(difference: float, error: float, count: int) -> float:
    """Return the two-sided p-value of a mean's difference from a bound; 1 for one value.

    Args:
        difference: Mean minus bound.
        error: Standard error of the mean.
        count: Number of values.
    """
    if count < 2 or difference == 0.0:
        return 1.0
    return 0.0 if error == 0.0 else two_sided(abs(difference) / error, count - 1)


def two_sided(t: float, degrees: int) -> float:
    """Return P(|T| ≥ t) by Simpson's rule.

    With n degrees of freedom, u = t / √(n + t²) has the density (1 − u²)^(n/2 − 1) / B(1/2, n/2).

    >>> round(two_sided(4.303, 2), 3), round(two_sided(2.306, 8), 3)
    (0.05, 0.05)
    """
    if degrees < 2:
        return 1.0 - 2.0 / math.pi * math.atan(t)
    u = np.linspace(0.0, t / math.sqrt(degrees + t * t), _STEPS)
    density = (1.0 - u * u) ** (degrees / 2 - 1)
    weights = np.ones(_STEPS)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    log_beta = math.lgamma(0.5) + math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    inside = float(weights @ density * (u[1] - u[0])) / 3.0
    return float(max(0.0, 1.0 - 2.0 * inside * math.exp(-log_beta)))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which hypotheses Holm's step-down method rejects.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.

    >>> holm([0.04, 0.001, 0.02])
    [True, True, True]
    >>> holm([0.04, 0.03, 0.02])
    [False, False, False]
    """
    rejected = [False] * len(p_values)
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[at] > level / (len(p_values) - rank):
            break
        rejected[at] = True
    return rejected

"""The correctness gate: no figure of a contestant that computes something else.

Layers are held to ``ila_kernels.testing.assert_within_rounding``, element by element. In a model of
many layers the largest error of a gradient is one of millions of draws, so gradients of models
are held to the same derived budget in the Euclidean norm:

    ‖ours − fp64‖  ≤  2 · (‖PEFT at the same dtype − fp64‖ + eps · ‖fp64‖)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ila_kernels.testing import assert_within_rounding

__all__ = ["GateRedError", "assert_gradients", "assert_within_rounding"]


class GateRedError(Exception):
    """A contestant computed something else; nothing may be reported."""


def assert_gradients(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Assert that every gradient is as right as ``dtype`` lets plain code be.

    Args:
        actual: Parameter name -> gradient of the contestant.
        exact: Of the same parameters, computed in fp64.
        plain: Of the same parameters, computed by PEFT in ``dtype``.
        dtype: Of the computation.

    Raises:
        AssertionError: If one is further away, missing, too many, or not finite.
    """
    if set(actual) != set(exact):
        odd = sorted(set(actual) ^ set(exact))
        raise AssertionError(f"gradients differ in {len(odd)} names, {odd[0]!r} first")
    for name, truth in exact.items():
        error = (actual[name].double() - truth).norm().item()
        other = (plain[name].double() - truth).norm().item()
        bound = 2.0 * (other + torch.finfo(dtype).eps * truth.norm().item())
        if not error <= bound:  # a NaN fails
            raise AssertionError(
                f"gradient of {name}: error {error:.3g} is {error / (bound or 1e-300):.2g} x the "
                f"bound {bound:.3g} (PEFT is {other:.2g} off)"
            )

"""The correctness gate: no figure of a contestant that computes something else.

Layers are held to ``ila_kernels.testing.assert_within_rounding``: maxima over all elements, because
the error of one element is a draw. In a model of many layers the error of a whole gradient is a
draw too, of all that was rounded on the way to it. So gradients g of a model are held to the same
derived budget, with the maximum over all of them:

    ‖ours − fp64‖ / ‖fp64‖  ≤  2 · (max over g of ‖plain − fp64‖ / ‖fp64‖  +  eps)

where plain is PEFT with everything in that dtype.
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
        plain: Of the same parameters, by PEFT with all in ``dtype``, adapters too.
        dtype: Of the computation.

    Raises:
        AssertionError: If one is further away, missing, too many, or not finite.
    """
    if set(actual) != set(exact):
        odd = sorted(set(actual) ^ set(exact))
        raise AssertionError(f"gradients differ in {len(odd)} names, {odd[0]!r} first")
    sizes = {name: truth.norm().item() or 1.0 for name, truth in exact.items()}

    def worst(found: Mapping[str, Tensor]) -> tuple[float, str]:
        errors = {n: (found[n].double() - exact[n]).norm().item() / sizes[n] for n in exact}
        bad = [n for n, error in errors.items() if not error < float("inf")]  # NaN too
        name = bad[0] if bad else max(errors, key=errors.__getitem__)
        return errors[name], name

    other, _ = worst(plain)
    bound = 2.0 * (other + torch.finfo(dtype).eps)
    error, name = worst(actual)
    if not error <= bound:
        raise AssertionError(
            f"gradient of {name}: relative error {error:.3g} is {error / bound:.2g} x the bound "
            f"{bound:.3g} (plain code is at most {other:.2g} off)"
        )

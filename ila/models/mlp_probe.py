"""Compare the forward of a class with its lean form once, on a small input.

In fp64 and to the bit: both forms make the same products in the same order and round each in the
same place, so there is no rounding to allow for. Nothing is drawn from torch's generators.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

WIDTH, INNER, ROWS = 3, 5, 4
_SHAPES = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
_known: dict[tuple[type, type, type], bool] = {}


def same_numbers(plain: type[nn.Module], lean: type[nn.Module], act_fn: nn.Module) -> bool:
    """Tell whether both classes give the same y and gradients; found out once for each.

    Args:
        plain: Class of a gated MLP.
        lean: Its lean subclass.
        act_fn: Activation of the block at hand.
    """
    key = (plain, lean, type(act_fn))
    if key not in _known:
        # The caller may build a model on fake tensors, on the meta device or in inference mode.
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            theirs, ours = (_run(kind, act_fn) for kind in (plain, lean))
            _known[key] = all(map(torch.equal, theirs, ours))
    return _known[key]


def _run(kind: type[nn.Module], act_fn: nn.Module) -> list[Tensor]:
    """Return y, and the gradients of x and of the weights."""
    block = kind.__new__(kind)
    nn.Module.__init__(block)
    leaves = {"x": _numbers(ROWS, WIDTH), **{n: _numbers(*s) for n, s in _SHAPES.items()}}
    for name in _SHAPES:
        setattr(block, name, partial(F.linear, weight=leaves[name]))
    block.act_fn = act_fn
    y = block.forward(leaves["x"])
    dy = _numbers(*y.shape).detach()
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]


def _numbers(rows: int, columns: int) -> Tensor:
    """Numbers between −3 and 3 without a pattern, the same in every call."""
    count = torch.arange(1, rows * columns + 1, dtype=torch.float64, device="cpu")
    return (
        (count * 0.618033988749895).remainder(1).mul(6).sub(3).view(rows, columns).requires_grad_()
    )

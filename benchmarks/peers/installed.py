"""Kernels of other projects, where their users have them installed; each needs a GPU.

Written from the projects' public sources and never run by us, who had no GPU: ``available()`` finds
what can be imported, and a peer whose call fails or whose numbers are off is left out of the run by
name, with the reason in the result file. None of them is a dependency.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

# x (M, K), W (N, K), A (R, K), B (N, R), s -> y (M, N); A and B in the dtype of x.
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

# Argument names of a projection's ``Function``: what a plain layer gives, and what it leaves None
# (dropout's output, bias, quantisation state, LoRA's bias, DoRA's magnitude).
_GIVEN = ("X", "W", "A", "B", "S", "s")
_ABSENT = ("X_drop", "b", "W_quant", "lora_bias", "magnitude")


def _by_names(function: type[torch.autograd.Function]) -> Layer:
    """Call a projection's ``Function`` by the names of its arguments, which differ by version."""
    names = list(inspect.signature(function.forward).parameters)[1:]
    unknown = [name for name in names if name not in (*_GIVEN, *_ABSENT)]
    if unknown:
        raise TypeError(
            f"{function.__name__}.forward takes {', '.join(unknown)}, of which nothing is known "
            f"here; known are {', '.join((*_GIVEN, *_ABSENT))}"
        )

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        given = dict(zip(_GIVEN, (x[None], weight, a, b, scale, scale), strict=True))
        return function.apply(*(given.get(name) for name in names))[0]

    return layer


def _unsloth() -> Layer:
    return _by_names(import_module("unsloth.kernels.fast_lora").LoRA_W)


def _axolotl() -> Layer:
    return _by_names(import_module("axolotl.kernels.lora").LoRA_O)


def _lorafusion() -> Layer:
    fused = import_module("lorafusion.ops.lora_v1").fused_linear_lora
    return lambda x, weight, a, b, scale: fused(x[None], weight, a, b, alpha=scale)[0]


_PEERS = {"Unsloth": _unsloth, "axolotl": _axolotl, "LoRAFusion": _lorafusion}


def available() -> dict[str, Callable[[], Layer]]:
    """Name -> what loads it, for those that are installed; none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {name: load for name, load in _PEERS.items() if find_spec(name.lower()) is not None}

"""Liger's kernels under PEFT, where they are installed: norms, rotary embedding, SwiGLU, loss.

Liger changes a model, and for the rotary embedding the module of transformers that every model of
the family shares. The latter is undone at once and in force in ``with in_force()`` only: the other
contestants of a run compute as they did. Written from the project's public sources and never run
by us on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

# Module of transformers -> the names in it that Liger replaces.
_REPLACED: dict[str, dict[str, object]] = {}


def is_available() -> bool:
    """Whether it is installed and there is a GPU, which its kernels need."""
    return torch.cuda.is_available() and find_spec("liger_kernel") is not None


def change(model: nn.Module) -> None:
    """Let Liger's kernels compute a model, under ``in_force``."""
    family = import_module("liger_kernel.transformers")
    apply = getattr(family, f"apply_liger_kernel_to_{model.config.model_type}")
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    apply(model=model)
    new = {name: value for name, value in vars(module).items() if before.get(name) is not value}
    _REPLACED[module.__name__] = new
    vars(module).update({name: before[name] for name in new})


@contextmanager
def in_force() -> Iterator[None]:
    """Let the shared modules of transformers be Liger's inside the block."""
    before = {name: dict(vars(sys.modules[name])) for name in _REPLACED}
    try:
        for name, new in _REPLACED.items():
            vars(sys.modules[name]).update(new)
        yield
    finally:
        for name, old in before.items():
            vars(sys.modules[name]).update({key: old[key] for key in _REPLACED[name]})

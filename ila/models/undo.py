"""A model as it was: what an edit that fails halfway has changed, put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Snapshot:
    """What a model consists of now: its modules, their attributes, configurations and parameters.

    Values are referred to and not copied, so this costs next to nothing while nothing is replaced.

    Args:
        model: Any model.
        copies: Whether dense weights in float32 may be written in place, and so are copied.
    """

    def __init__(self, model: nn.Module, copies: bool = False):
        modules = list(model.modules())
        configs = {id(c): c for m in modules if hasattr(c := vars(m).get("config"), "__dict__")}
        self._objects = [_Kept(each) for each in (*modules, *configs.values())]
        self._parameters = [
            (p, p.data.clone() if copies and p.dtype == torch.float32 else p.data, p.requires_grad)
            for p in model.parameters()
        ]

    def restore(self) -> None:
        """Make the model what it was."""
        for kept in self._objects:
            kept.restore()
        for parameter, data, required in self._parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(required)


class _Kept:
    """The class and attributes of an object, and what its dictionaries hold."""

    def __init__(self, owner: Any):
        self.owner, self.kind, self.attributes = owner, type(owner), dict(vars(owner))
        self.held = {k: dict(v) for k, v in self.attributes.items() if isinstance(v, dict)}

    def restore(self) -> None:
        self.owner.__class__ = self.kind
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        for name, held in self.held.items():
            self.attributes[name].clear()
            self.attributes[name].update(held)

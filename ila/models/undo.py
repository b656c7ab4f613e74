"""Put a model back as it was, after an edit that fails halfway."""

from __future__ import annotations

import torch
from torch import nn


class Snapshot:
    """Parts of a model now: its modules, their attributes, configurations and parameters.

    It keeps references and no copies, so this costs almost nothing while no part is replaced.

    Args:
        model: Any model.
        copies: Whether to copy dense float32 weights, which an edit may write in place.
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
        """Put the model back."""
        for kept in self._objects:
            kept.restore()
        for parameter, data, required in self._parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(required)


class _Kept:
    """Class and attributes of an object, and the content of its dictionaries."""

    def __init__(self, owner: object):
        self.owner, self.kind, self.attributes = owner, type(owner), dict(vars(owner))
        self.held = {k: dict(v) for k, v in self.attributes.items() if isinstance(v, dict)}

    def restore(self) -> None:
        self.owner.__class__ = self.kind
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        for name, held in self.held.items():
            self.attributes[name].clear()
            self.attributes[name].update(held)

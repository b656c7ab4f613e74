"""Change the class of a module of transformers to a subclass of ours, and back.

Parameters, names, hooks and references stay valid. The module is still an instance of its old
class, and copies and pickles work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound="Swapped")


class Swapped(nn.Module):
    """Mixin before the plain class of a module.

    Attributes:
        plain_class: Class of transformers that the module had.
    """

    plain_class: ClassVar[type[nn.Module]]

    def unload_and_optionally_merge_module(self, **options: object) -> nn.Module:
        """Become plain; PEFT calls this method by name when it removes adapters."""
        self.__class__ = self.plain_class
        return self


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether the forward of a module was replaced on the instance."""
    return "forward" in module.__dict__


def swap(
    model: nn.Module,
    classes: Mapping[type[nn.Module], type[Swapped]],
    parts: Sequence[str],
    label: str,
    why_not: Callable[[nn.Module], str | None] = lambda module: None,
) -> tuple[list[str], dict[str, str]]:
    """Change the class of every module that has these parts and a plain class of ``classes``.

    Args:
        model: Model to change.
        classes: Plain class of transformers -> ours.
        parts: Names of submodules that a module must have.
        label: Name of such a module, for the reasons.
        why_not: Returns a further reason against a module, or None.

    Returns:
        The names of the changed modules, and name -> reason for the others.
    """
    changed, left = [], {}
    for name, module in model.named_modules():
        if not all(part in module._modules for part in parts):
            continue
        reason = _why_not(module, classes, label) or why_not(module)
        if reason is None:
            module.__class__ = classes[type(module)]
            changed.append(name)
        else:
            left[name] = reason
    return changed, left


def swapped(model: nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    """Return name -> module for every module of this class."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def swap_back(model: nn.Module, kind: type[Kind]) -> list[str]:
    """Give every module of this class its plain class again; return their names."""
    modules = swapped(model, kind)
    for module in modules.values():
        module.__class__ = module.plain_class
    return list(modules)


def _why_not(module: nn.Module, classes: Mapping[type, type], label: str) -> str | None:
    kind = type(module)
    if isinstance(module, Swapped):
        return "already converted"
    # Liger puts its class in the place of transformers', under that name.
    if kind not in classes or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is no {label} of transformers' Llama or Mistral"
    if has_own_forward(module):
        return "its forward was replaced on the instance (Liger's kernels, a dispatch hook?)"
    return None

"""A module of transformers whose class was changed to a subclass of its own, and the way back.

Parameters, names, hooks and references stay what they were; so does what the module is (a subclass
is an instance of its parent), and copies and pickles of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound="Swapped")


class Swapped(nn.Module):
    """Mixed in before the class of transformers that a module had.

    Attributes:
        plain_class: That class.
    """

    plain_class: ClassVar[type[nn.Module]]

    def unload_and_optionally_merge_module(self, **options: Any) -> nn.Module:
        """Become plain: PEFT calls this, by name, on the way to a model without adapters."""
        self.__class__ = self.plain_class
        return self


def swap(
    model: nn.Module,
    classes: Mapping[type[nn.Module], type[Swapped]],
    parts: Sequence[str],
    what: str,
    why_not: Callable[[nn.Module], str | None] = lambda module: None,
) -> tuple[list[str], dict[str, str]]:
    """Change the class of every module that has these parts and a plain class of ``classes``.

    Args:
        model: Where to look.
        classes: Plain class of transformers -> ours.
        parts: Names of submodules that make a module of this kind.
        what: The kind, in words.
        why_not: What else stands against a module of such a class, or None.

    Returns:
        The names of the modules changed, and name -> reason of those left.
    """
    changed, left = [], {}
    for name, module in model.named_modules():
        if not all(part in module._modules for part in parts):
            continue
        reason = _why_not(module, classes, what) or why_not(module)
        if reason is None:
            module.__class__ = classes[type(module)]
            changed.append(name)
        else:
            left[name] = reason
    return changed, left


def swapped(model: nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    """Module name -> module, for every module whose class was changed to this kind."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def swap_back(model: nn.Module, kind: type[Kind]) -> list[str]:
    """Give every module of this kind its plain class again; return their names."""
    found = swapped(model, kind)
    for module in found.values():
        module.__class__ = module.plain_class
    return list(found)


def _why_not(module: nn.Module, classes: Mapping[type, type], what: str) -> str | None:
    kind = type(module)
    if isinstance(module, Swapped):
        return "already converted"
    # Liger puts its class in the place of transformers', under that name.
    if kind not in classes or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is no {what} of transformers' Llama or Mistral"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (Liger's kernels, a dispatch hook?)"
    return None

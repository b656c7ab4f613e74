"""Change the class of a module of a model to a subclass of ours, and back.

Parameters, names, hooks and references stay valid. The module is still an instance of its old
class, and copies and pickles work. The code of a class decides, not its name: a subclass is made
for every class whose forward is known (``ila.models.same_code``).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import ClassVar, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound="Swapped")


class Swapped(nn.Module):
    """Mixin before the plain class of a module; ``subclass`` makes the class of both.

    Attributes:
        plain_class: Class that the module had.
        kind: Class of ours that the module has beside it.
        parts: Names of submodules that a module must have.
        prefix: Begin of the name of each subclass.
    """

    plain_class: ClassVar[type[nn.Module]]
    kind: ClassVar[type[Swapped]]
    parts: ClassVar[tuple[str, ...]]
    prefix: ClassVar[str]

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Return the reason why a module of another class cannot become one of ours, or None."""
        raise NotImplementedError

    @staticmethod
    def forward_over(plain: type[nn.Module]) -> Callable[..., object]:
        """Return the forward over that of the plain class.

        It names this class, not ``super()``: a hook may keep it, and it must stay callable after
        the module is plain again.
        """
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> tuple[object, ...]:
        """Name both classes, for copies and pickles: no module holds the class made of them."""
        _, _, *state = super().__reduce_ex__(2)
        return _blank, (self.kind, self.plain_class), *state

    def unload_and_optionally_merge_module(self, **options: object) -> nn.Module:
        """Become plain; PEFT calls this method by name when it removes adapters."""
        self.__class__ = self.plain_class
        return self


@functools.cache
def subclass(kind: type[Kind], plain: type[nn.Module]) -> type[Kind]:
    """Return the one class that is of this kind and a subclass of ``plain``."""
    members = {
        "__doc__": f"``{plain.__name__}`` as a ``{kind.__name__}``.",
        "__module__": kind.__module__,
        "forward": kind.forward_over(plain),
        "kind": kind,
        "plain_class": plain,
    }
    name = f"{kind.prefix}{plain.__name__}"
    return types.new_class(name, (kind, plain), exec_body=lambda space: space.update(members))


def _blank(kind: type[Kind], plain: type[nn.Module]) -> Kind:
    made = subclass(kind, plain)
    return made.__new__(made)


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether the forward of a module was replaced on the instance."""
    return "forward" in module.__dict__


def has_parts(module: nn.Module, kind: type[Swapped]) -> bool:
    """Tell whether a module has the submodules of this kind."""
    return all(part in module._modules for part in kind.parts)


def swap(model: nn.Module, kind: type[Swapped]) -> tuple[list[str], dict[str, str]]:
    """Change the class of every module that has the parts of this kind and a forward that is known.

    Returns:
        The names of the changed modules, and name -> reason for the others that have the parts.
    """
    changed, left = [], {}
    for name, module in model.named_modules():
        if not has_parts(module, kind):
            continue
        reason = why_plain(module, kind)
        if reason is None:
            module.__class__ = subclass(kind, type(module))
            changed.append(name)
        else:
            left[name] = reason
    return changed, left


def why_plain(module: nn.Module, kind: type[Swapped]) -> str | None:
    """Return the reason why a module with the parts of this kind keeps its class, or None."""
    if isinstance(module, Swapped):
        return "already converted"
    if has_own_forward(module):
        return "its forward was replaced on the instance (Liger's kernels, a dispatch hook?)"
    return kind.why_not(module)


def swapped(model: nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    """Return name -> module for every module of this class."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def swap_back(model: nn.Module, kind: type[Kind]) -> list[str]:
    """Give every module of this class its plain class again; return their names."""
    modules = swapped(model, kind)
    for module in modules.values():
        module.__class__ = module.plain_class
    return list(modules)

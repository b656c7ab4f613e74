"""Take one path in a forward and in its recomputation, even if hooks change between the two.

A checkpoint runs a block again in backward and expects the tensors that it saved the first time.
Hooks decide which code computes a layer, and hooks come and go: a profiler or a counter around
backward alone hooks every module. So a checkpointed forward records the hooks that it found
(``Record``), and its recomputation reads this record instead of looking again.

It only remains to check that a tensor is the same as before (``Seen``). A hook that changes the
input of a module shows there, so this module need not read the forward hooks that torch calls for
every module.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

T = TypeVar("T")


class _Current(threading.local):
    """The record that this thread's forward reads and fills, and whether it runs again."""

    record: dict[object, Any] | None = None
    again: bool = False


_current = _Current()


class Recorded:
    """``function``, to be run by a checkpoint: later calls find the hooks of the first one.

    Args:
        function: Function of the checkpoint.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.ran = function, False
        # Inside a checkpoint that is recomputed, this one is made anew.
        self.record = {} if _current.record is None else _current.record

    def __call__(self, *args: Any) -> Any:
        """Run the function."""
        outer = _current.record, _current.again
        _current.record = self.record
        _current.again = outer[1] or self.ran
        try:
            return self.function(*args)
        finally:
            self.ran = True
            _current.record, _current.again = outer


def has_hooks(*modules: nn.Module) -> bool:
    """Tell whether a hook may see or change the input or the output of one of these.

    Hooks that torch calls for every module do not count.
    """
    return remembered(modules, lambda: _have_hooks(modules))


def gradients_are_watched() -> bool:
    """Tell whether torch calls a hook with the gradients of every module."""
    return remembered(gradients_are_watched, _are_watched)


def _are_watched() -> bool:
    return bool(module_globals._global_backward_hooks or module_globals._global_backward_pre_hooks)


def remembered(question: object, answer: Callable[[], T]) -> T:
    """Return the answer of the first run of a checkpoint; ask where there is no record."""
    if torch.compiler.is_compiling() or _current.record is None:
        return answer()
    if question not in _current.record:
        _current.record[question] = answer()
    return _current.record[question]


def _have_hooks(modules: tuple[nn.Module, ...]) -> bool:
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own  # how accelerate hooks a module
        ):
            return True
    return False


class Seen:
    """A tensor, and the modes of torch in which it was seen.

    torch does not count a write through ``x.data``; it goes unnoticed.
    """

    __slots__ = ("modes", "version", "x")

    def __init__(self, x: Tensor):
        self.x, self.version, self.modes = x, version_of(x), _modes(x)

    def is_now(self, x: Tensor, asking: nn.Module) -> bool:
        """Tell a module whether this is the tensor, unchanged, and the modes are the same."""
        same = x is self.x
        record = None if torch.compiler.is_compiling() else _current.record
        if record is not None and _current.again:
            # A backward hook hands its module an alias of x: one that has come since the forward
            # changes nothing, and nor does one that has gone.
            before = record.get((Seen, asking))
            same = before is not False and (same or (before is True and _is_alias(x, self.x)))
        same = same and self.version == version_of(x) and self.modes == _modes(x)
        if record is not None and not _current.again:
            record[Seen, asking] = same
        return same


def version_of(x: Tensor) -> int | None:
    """Return the number of changes of x in place; ``None`` for inference and for no tensor."""
    if torch.compiler.is_compiling():  # a trace replays changes in place as they come
        return 0
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _modes(x: Tensor) -> tuple[object, ...]:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    # A trace is made in one inference mode, and cannot ask for it.
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.is_grad_enabled(), inference, autocast


def _is_alias(x: Tensor, other: Tensor) -> bool:
    """Tell whether both are one piece of memory, read alike."""
    if not isinstance(x, Tensor) or x.dtype != other.dtype or x.shape != other.shape:
        return False
    return x.stride() == other.stride() and x.data_ptr() == other.data_ptr()

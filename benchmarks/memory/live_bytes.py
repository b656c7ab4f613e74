"""Bytes of every tensor that is alive, and the most there were: counted, on real or fake tensors.

A storage counts from the operator that made it until nothing refers to it, whoever holds it: the
graph, a checkpoint, a local variable of some backward. What one operator allocates and frees inside
of itself is not seen, and neither is how an allocator rounds and fragments.

**Every length from one count.** In a step over one row of T tokens without an attention mask, a
tensor has T in its shape once, or T + 1 (the labels before they are shifted), or not at all. With T
and (T + 1)/2 prime, and larger than any prime factor of the model's own sizes, divisibility tells
which. So each count is constant + per_token · T, and holds for every T. T is also more than two
chunks of a lean head, whose logits are as large at any T above one chunk; below, they are less.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS = 4177  # prime, and so is 2089


class Bytes(NamedTuple):
    """``constant + per_token · tokens`` bytes."""

    constant: int
    per_token: int = 0

    def at(self, tokens: int) -> int:
        return self.constant + self.per_token * tokens

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(self.constant + other.constant, self.per_token + other.per_token)

    def minus(self, other: Bytes) -> Bytes:
        return Bytes(self.constant - other.constant, self.per_token - other.per_token)


def split(count: int, tokens: int | None) -> Bytes:
    """Bytes of a storage as a function of T, from those at T = ``tokens``; see above.

    >>> split(2 * 2017 * 4096, 2017), split(2018 * 8, 2017), split(4096, 2017)
    (Bytes(constant=0, per_token=8192), Bytes(constant=8, per_token=8), Bytes(constant=4096, per_token=0))
    """  # noqa: E501
    if tokens is None:
        return Bytes(count)
    if count % tokens == 0:
        return Bytes(0, count // tokens)
    if count % ((tokens + 1) // 2) == 0:
        return Bytes(count // (tokens + 1), count // (tokens + 1))
    return Bytes(count)


class LiveBytes(TorchDispatchMode):
    """Count storages while it is entered; inside of a ``FakeTensorMode``, enter it after that.

    Args:
        tokens: The T of the step, if counts are wanted as functions of it; one for which the above
            holds. ``None``: every count is a constant.

    Attributes:
        now: Bytes that are alive.
        peaks: The counts so far that no other exceeds at every T; with ``tokens=None``, one.
    """

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.now = Bytes(0)
        self.peaks: list[Bytes] = [self.now]
        self._alive: dict[int, weakref.ref] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors; each storage once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive and storage.nbytes():
                count = split(storage.nbytes(), self.tokens)
                self._alive[key] = weakref.ref(storage, partial(self._gone, key, count))
                self.now = self.now.plus(count)
        here = self.now
        if not any(
            p.constant >= here.constant and p.per_token >= here.per_token for p in self.peaks
        ):
            self.peaks = [
                *(
                    p
                    for p in self.peaks
                    if p.constant > here.constant or p.per_token > here.per_token
                ),
                here,
            ]

    def begin_anew(self) -> None:
        """Forget every peak but the present."""
        self.peaks = [self.now]

    def _gone(self, key: int, count: Bytes, _: weakref.ref) -> None:
        del self._alive[key]
        self.now = self.now.minus(count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

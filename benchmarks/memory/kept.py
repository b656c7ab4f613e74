"""Bytes that autograd keeps for backward, by place, told by its hooks on saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Where a tensor is kept: children of a block, and all that is outside of the blocks.
PLACES = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
OUTSIDE = "embedding, head, loss"


class _Kept:
    """What the graph holds in place of a tensor; it dies with that part of the graph."""

    def __init__(self, tensor: Tensor, place: str) -> None:
        self.tensor, self.place = tensor, place


def saved_bytes(model: nn.Module, compute: Callable[[], Any]) -> dict[str, int]:
    """Bytes that the graph of ``compute()`` keeps, by place; the result is alive while counting.

    A storage that several functions keep counts once, where it is met first.
    """
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: WeakSet[_Kept] = WeakSet()
    order: list[str] = [OUTSIDE]

    def pack(tensor: Tensor) -> _Kept:
        entry = _Kept(tensor, order[-1])
        kept.add(entry)
        return entry

    with _places(model, order), saved_tensors_hooks(pack, lambda entry: entry.tensor):
        result = compute()
    place_of: dict[int, tuple[str, int]] = {}
    for entry in kept:
        storage = entry.tensor.untyped_storage()
        if storage._cdata not in owned:
            others = place_of.get(storage._cdata, (entry.place, 0))
            place_of[storage._cdata] = (min(others[0], entry.place), storage.nbytes())
    del result
    counts = dict.fromkeys((*PLACES, OUTSIDE), 0)
    for place, count in place_of.values():
        counts[place] += count
    return counts


@contextmanager
def _places(model: nn.Module, order: list[str]) -> Iterator[None]:
    """Keep the place that is computing at the end of ``order``."""
    handles = []
    for name, module in model.named_modules():
        place = name.rpartition(".")[2]
        if place in PLACES:
            handles.append(
                module.register_forward_pre_hook(lambda *_, place=place: order.append(place))
            )
            handles.append(module.register_forward_hook(lambda *_: order.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

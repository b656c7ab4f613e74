"""One op for the layers that read one x: q, k and v of an attention block, gate and up of an MLP.

Apart, n layers read x 2n times forward, and autograd adds their n gradients of x; as one
``masked_lora_linear_group`` they read it n + 1 times and accumulate into one dx.

A block's own forward does not change: it calls its layers one by one, with any code. While it runs
(``sharing``), the first call computes all of them. A later call with the same x in the same modes
of torch returns the stored result; any other call computes for itself. A layer with hooks is left
out: a hook may see or change its input, or fetch its weights. Two changes in between go unnoticed:
of x through ``x.data``, and of a layer that has not been called yet.

With closed layers among them the sum of the gradients is still shared. Their y is the y of the bare
layer, bit for bit; in 16 bits dx is rounded after each layer, where autograd rounds twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ila.models.layer import MaskedLoraLayer, Operands
from ila.models.recomputation import Seen, gradients_are_watched, has_hooks, version_of
from ila_kernels import group_pays, masked_lora_linear_group
from ila_kernels.quant import PackedWeight


class SharedInput:
    """Joint computation of a few layers on one x, while the forward of a block runs."""

    __slots__ = ("layers", "outputs", "seen")

    def __init__(self, layers: Sequence[MaskedLoraLayer]):
        self.layers = layers
        self.seen: Seen | None = None
        self.outputs: dict[MaskedLoraLayer, Tensor] = {}

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.join(self)

    def __exit__(self, *error: object) -> None:
        for layer in self.layers:
            layer.join(None)

    def output_of(self, layer: MaskedLoraLayer, x: Tensor) -> Tensor | None:
        """y of a layer, once; ``None`` where it has to compute for itself."""
        if version_of(x) is None:
            return None
        if self.seen is None:
            self.seen = Seen(x)
            self.outputs = _together(self.layers, x)
        return self.outputs.pop(layer, None) if self.seen.is_now(x, layer) else None


def sharing(block: nn.Module, names: Sequence[str]) -> SharedInput:
    """Let the layers of a block that have these names compute together while this is entered."""
    return SharedInput(sharers(block, names))


def sharers(block: nn.Module, names: Sequence[str]) -> list[MaskedLoraLayer]:
    """Return the layers that may compute together: ours, without hooks; [] if fewer than two."""
    if gradients_are_watched():
        return []
    modules = (block._modules.get(name) for name in names)
    layers = [m for m in modules if isinstance(m, MaskedLoraLayer) and not has_hooks(m)]
    return layers if len(layers) > 1 else []


def _together(layers: Sequence[MaskedLoraLayer], x: Tensor) -> dict[MaskedLoraLayer, Tensor]:
    if not group_pays(x, len(layers)):
        return {}
    found = {layer: layer.operands(x) for layer in layers}
    members = partners(found, x, x.requires_grad and torch.is_grad_enabled())
    return dict(zip(members, _ys(x, list(members.values())), strict=True)) if members else {}


def partners(
    found: Mapping[MaskedLoraLayer, Operands | None], x: Tensor, differentiated: bool
) -> dict[MaskedLoraLayer, Operands]:
    """Return the layers that compute as one op on x; none if that would not pay.

    Args:
        found: Operands of each layer.
        x: Input; only its rows and its device matter.
        differentiated: Whether a gradient passes x.
    """
    adapted = [m for m in found.values() if m is not None and m.lora_a is not None]
    if len({m.dropout_p for m in adapted}) != 1:
        return {}
    members = {
        layer: operands
        for layer, operands in found.items()
        # Without an adapter there is only dx to share.
        if operands is not None and (differentiated or operands.lora_a is not None)
    }
    # Under autocast packed and dense weights round x to different dtypes.
    if len({_is_packed(operands.weight) for operands in members.values()}) != 1:
        return {}
    pays = group_pays(x, len(adapted), len(members) - len(adapted))
    return members if pays else {}


def _is_packed(weight: Tensor | PackedWeight) -> bool:
    return isinstance(weight, PackedWeight) or not weight.is_floating_point()


def _ys(x: Tensor, members: Sequence[Operands]) -> tuple[Tensor, ...]:
    weights, lora_as, lora_bs, gates, biases, scales, dropouts = zip(*members, strict=True)
    return masked_lora_linear_group(
        *(x, weights, lora_as, lora_bs, gates),
        biases=biases,
        scales=scales,
        dropout_p=max(dropouts),
    )

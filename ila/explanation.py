"""``explain``: which code computes each LoRA layer of a model, and why."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.lora.layer import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import nn

from ila.layer import BARE, PEFT, MaskedLoraLayer
from ila_kernels.config import resolve_impl
from ila_kernels.device import call_of


@dataclass(frozen=True)
class LayerRow:
    """One LoRA layer: module name, whether an adapter is open in it, path taken, and why."""

    module: str
    open: bool
    path: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """The rows of ``explain``; printing it shows the table."""

    rows: tuple[LayerRow, ...]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def paths(self) -> dict[str, int]:
        """Number of layers that take each path."""
        return dict(Counter(row.path for row in self.rows))

    def table(self) -> Table:
        """The rows as a rich table."""
        counts = ", ".join(f"{count} {path}" for path, count in self.paths().items())
        table = Table("module", "open", "path", "why", title=f"{len(self.rows)} layers: {counts}")
        for row in self.rows:
            table.add_row(row.module, "yes" if row.open else "no", row.path, row.why)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160)
        console.print(self.table())
        return console.file.getvalue()


def explain(model: nn.Module) -> Explanation:
    """Say for every LoRA layer which path it takes as the model stands, and why.

    Args:
        model: A ``PeftModel``, or any module that contains PEFT LoRA layers.

    Returns:
        One row per LoRA layer. Paths: the implementation of the op (``"eager"``), ``"bare"`` (the
        base layer alone) or ``"peft"`` (PEFT's own forward).

    Raises:
        ValueError: If the model has no LoRA layer.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, MaskedLoraLayer):
            rows.append(_masked_row(name, module))
        elif isinstance(module, LoraLayer):
            rows.append(LayerRow(name, True, PEFT, f"not converted ({type(module).__name__})"))
    if not rows:
        raise ValueError("model has no LoRA layer to explain")
    return Explanation(tuple(rows))


def _masked_row(name: str, layer: MaskedLoraLayer) -> LayerRow:
    path, reason, adapter = layer.route()
    if path == BARE:
        closed = [a for a in layer.active_adapters if layer.is_closed(a)]
        return LayerRow(name, False, BARE, "closed by a mask" if closed else reason)
    if adapter is not None:
        weight = layer.base_layer.weight
        if not weight.is_floating_point():
            return LayerRow(name, True, "eager", f"{reason}; its products are bitsandbytes' own")
        call = call_of(weight, weight.shape[0], None, weight.dtype)
        impl, why = resolve_impl("auto", weight.device.type, call)
        return LayerRow(name, True, impl, f"{reason}; {why}")
    return LayerRow(name, any(a in layer.lora_A for a in layer.active_adapters), path, reason)

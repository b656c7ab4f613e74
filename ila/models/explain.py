"""``explain``: report the code that computes each LoRA layer, and the bytes it keeps for backward.

A layer is *in the prefix* if backward never reaches it: everything below the lowest open layer.
Backward passes through a closed layer above, dropped or kept: this costs its dx and keeps nothing.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ila.masks.names import GATE_UP, GROUPS, QKV
from ila.models.attention import FusedQkv
from ila.models.blocks import below_is_trained, find_blocks, frozen_blocks, is_trained
from ila.models.class_swap import swapped
from ila.models.layer import BARE, PEFT, SHARDED, MaskedLoraLayer
from ila.models.lean_head import HeadRoute, head_route
from ila.models.mlp import LEAN, LeanMLP, MlpRoute, lean_mlps
from ila.models.plain_blocks import by_kind, plain_blocks
from ila.models.shared_input import partners, sharers
from ila.models.tensors import MaskedTensor, named_layers
from ila_kernels.config import resolve_impl
from ila_kernels.device import call_of
from ila_kernels.roofline import Problem, saved_bytes

_STEP_OF = {name: step for step, names in enumerate(GROUPS) for name in names}


@dataclass(frozen=True)
class LayerRow:
    """One LoRA layer.

    Attributes:
        module: Its name.
        open: Whether an adapter learns in it.
        path: Which code computes it.
        why: The reason.
        in_prefix: Whether backward never comes to it.
        saved_bytes: Activations that its forward keeps for backward; an x that several layers read
            counts for the first that keeps it. None where PEFT's own code decides (variants,
            several adapters).
    """

    module: str
    open: bool
    path: str
    why: str
    in_prefix: bool = False
    saved_bytes: int | None = None


@dataclass(frozen=True)
class Explanation:
    """The rows of ``explain`` for a number of tokens; printing it shows the table.

    ``mlps`` describes the tensors that each gated MLP keeps for backward. ``together`` describes
    the layers of each block that compute as one op, because they read one x
    (``ila.models.shared_input``). ``head`` describes the code that computes the loss of a model
    with a lean head; None without one. ``plain`` gives the reason for each attention block and MLP
    that computes layer by layer.
    """

    rows: tuple[LayerRow, ...]
    tokens: int = 0
    mlps: Mapping[str, MlpRoute] = field(default_factory=dict)
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: HeadRoute | None = None
    plain: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def paths(self) -> dict[str, int]:
        """Number of layers that take each path."""
        return dict(Counter(row.path for row in self.rows))

    def saved_bytes(self) -> int:
        """Sum the bytes that layers keep for backward, without the layers of unknown bytes."""
        return sum(row.saved_bytes or 0 for row in self.rows)

    def as_dict(self) -> dict[str, object]:
        """Return the rows and their total, for JSON."""
        rows = [asdict(row) for row in self.rows]
        head = None if self.head is None else self.head._asdict()
        total = self.saved_bytes()
        return {"tokens": self.tokens, "layers": rows, "saved_bytes": total, "head": head}

    def table(self) -> Table:
        """Lay the rows out as a rich table, with a row of totals."""
        counts = ", ".join(f"{count} {path}" for path, count in self.paths().items())
        table = Table(
            title=f"{len(self.rows)} layers: {counts}; saved for backward at {self.tokens} tokens",
            show_footer=True,
        )
        unknown = any(row.saved_bytes is None for row in self.rows)
        prefix, opened = (sum(flags) for flags in zip(*self._flags(), strict=True))
        total = f"{'≥ ' * unknown}{_mib(self.saved_bytes())}"
        table.add_column("module", "total", overflow="fold")
        table.add_column("open", str(opened))
        table.add_column("prefix", str(prefix))
        table.add_column("saved, MiB", total, justify="right", no_wrap=True)
        table.add_column("path")
        table.add_column("why")
        for row in self.rows:
            saved = "?" if row.saved_bytes is None else _mib(row.saved_bytes)
            flags = ("yes" if flag else "no" for flag in (row.open, row.in_prefix))
            table.add_row(row.module, *flags, saved, row.path, row.why)
        table.caption = "\n".join(self.notes())
        return table

    def notes(self) -> list[str]:
        """Return a line each on the MLPs, on layers that compute together, and on the head."""
        lines = []
        if self.mlps:
            counts = Counter(f"{path} ({reason})" for path, reason in self.mlps.values())
            kept = ", ".join(f"{count} {route}" for route, count in counts.items())
            lines.append(f"{len(self.mlps)} gated MLPs keep for backward: {kept}")
        if self.together:
            counts = Counter(", ".join(names) for names in self.together.values())
            ops = "; ".join(f"{names} in {count} blocks" for names, count in counts.items())
            lines.append(f"One op for each x: {ops}")
        lines += [f"Computed layer by layer: {line}" for line in by_kind(self.plain)]
        if self.head is not None:
            lines.append(f"Head and loss: {self.head.path} ({self.head.reason})")
        return lines

    def _flags(self) -> Iterator[tuple[bool, bool]]:
        return ((row.in_prefix, row.open) for row in self.rows)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160)
        console.print(self.table())
        return console.file.getvalue()


def explain(model: nn.Module, tokens: int = 4096) -> Explanation:
    """Report the path of every LoRA layer in the model as it is, the reason, and the kept bytes.

    A formula counts the bytes of a training step: ``ila_kernels.roofline.saved_bytes``. It counts
    linear layers alone; attention, norms and activations keep more. With
    checkpointing a block keeps its input, and these bytes while it runs again.

    Args:
        model: A ``PeftModel``, or any module that contains PEFT LoRA layers.
        tokens: Tokens of a step, rows × length.

    Returns:
        One row per LoRA layer. Paths: the implementation of the op (``"eager"``), ``"bare"`` (the
        base layer alone) or ``"peft"`` (PEFT's own forward).

    Raises:
        ValueError: If the model has no LoRA layer, or ``tokens`` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be ≥ 1, got {tokens}")
    layers = named_layers(model, LoraLayer)
    if not layers:
        raise ValueError("model has no LoRA layer to explain")
    gathered = _gathered_by_fsdp(model, layers)
    mlps = {n: block.route(block.down_proj in gathered) for n, block in lean_mlps(model).items()}
    rows, kept_x, of_model = [], set(), getattr(model, "dtype", None)
    # Its down_proj keeps gate and up in place of x: as wide, twice.
    lean = {f"{name}.down_proj" for name, route in mlps.items() if route.path == LEAN}
    flows = _inputs_that_require_grad(model, layers)
    for name, layer in layers.items():
        if isinstance(layer, MaskedLoraLayer):
            is_open, path, why = _masked_row(layer, layer in gathered)
        else:
            is_open, path, why = True, PEFT, f"not converted ({type(layer).__name__})"
        needs = _needs(layer, flows[name])
        dtype = _dtype(layer, of_model)
        saved = _saved(layer, dtype, path, needs, tokens)
        if saved and path not in (PEFT, BARE) and "lora_a" in needs:
            parent, _, own = name.rpartition(".")
            group = (parent, _STEP_OF.get(own, own))
            if group in kept_x:
                saved -= tokens * layer.in_features * dtype.itemsize
            elif name in lean:
                saved += tokens * layer.in_features * dtype.itemsize
            kept_x.add(group)
        rows.append(LayerRow(name, is_open, path, why, not needs, saved))
    head = head_route(model, gathered=isinstance(model, FSDPModule))
    together = _together(model, flows, tokens)
    return Explanation(tuple(rows), tokens, mlps, together, head, plain_blocks(model))


def _together(
    model: nn.Module, flows: Mapping[str, bool], tokens: int
) -> dict[str, tuple[str, ...]]:
    """Block -> its layers that compute as one op."""
    found = {}
    for kind, names in ((FusedQkv, QKV), (LeanMLP, GATE_UP)):
        for block_name, block in swapped(model, kind).items():
            operands = {layer: layer.operands(None) for layer in sharers(block, names)}
            layers = {n: block._modules[n] for n in names if block._modules[n] in operands}
            if layers:
                x = torch.empty(tokens, 0, device=block._modules[next(iter(layers))].weight.device)
                differentiated = any(flows[f"{block_name}.{n}"] for n in layers)
                members = partners(operands, x, differentiated)
                found[block_name] = tuple(n for n, layer in layers.items() if layer in members)
    return {name: together for name, together in found.items() if together}


def _gathered_by_fsdp(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[nn.Module]:
    """Return the layers that FSDP2 shards here and gathers before they run."""
    sharded = {
        layer
        for layer in layers.values()
        if isinstance(layer, MaskedLoraLayer) and layer.route() is SHARDED
    }
    managed = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inside = {inner for outer in managed for inner in outer.modules()}
    # Where tensor parallelism has split W as well, FSDP still gathers a part only.
    return {layer for layer in sharded & inside if len(_splits(layer)) == 1}


def _splits(layer: LoraLayer) -> list[object]:
    return [p for p in layer.get_base_layer().weight.placements if not p.is_replicate()]


def _masked_row(layer: MaskedLoraLayer, gathered: bool) -> tuple[bool, str, str]:
    path, reason, adapter = layer.route()
    if gathered:  # ``route`` asks for sharding last: nothing else stands against the op
        reason, adapter = f"{layer.plain}, gathered by FSDP before it runs", layer.active_adapters
    if path == BARE:
        closed = [a for a in layer.active_adapters if layer.is_closed(a)]
        return False, BARE, "closed by a mask" if closed else reason
    if adapter is not None:
        is_open = not all(layer.is_kept(a) for a in layer.active_adapters)
        reason = reason if is_open else f"kept by a mask: its adapter learns no more; {reason}"
        if isinstance(layer, MaskedTensor):
            return is_open, path, reason
        weight = layer.base_layer.weight
        if not weight.is_floating_point():
            return is_open, "eager", f"{reason}; W is packed: bitsandbytes' products"
        name = adapter if isinstance(adapter, str) else adapter[0]
        lora_a, dropout_p = layer.factors(name)[0], getattr(layer.lora_dropout[name], "p", 0.0)
        call = call_of([weight], [lora_a], None, weight.dtype, dropout_p)
        impl, why = resolve_impl("auto", weight.device.type, call)
        return is_open, impl, f"{reason}; {why}"
    return any(layer.is_open(a) for a in layer.active_adapters), path, reason


def _inputs_that_require_grad(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, bool]:
    """Return layer name -> whether a gradient passes its x, by the parameters in and below it."""
    blocks, depth = find_blocks(model), frozen_blocks(model)
    if blocks is None:
        return dict.fromkeys(layers, True)
    place = {id(m): at for at, block in enumerate(blocks.layers) for m in block.modules()}
    first = blocks.layers[depth] if depth < len(blocks.layers) else None
    embedding = below_is_trained(model, blocks)
    flows = {}
    for name, layer in layers.items():
        at = place.get(id(layer))
        if at is None:  # the head runs after every block
            flows[name] = depth < len(blocks.layers)
        elif at == depth:
            flows[name] = embedding or _flows_within(first, name.rpartition(".")[2], layers)
        else:
            flows[name] = at > depth
    return flows


def _flows_within(block: nn.Module, own: str, layers: dict[str, nn.Module]) -> bool:
    """Tell whether something trained in the lowest open block comes before its layer ``own``."""
    inside = {m: n.rpartition(".")[2] for n, m in block.named_modules() if m in layers.values()}
    held = {p for layer in inside for p in layer.parameters()}
    others = any(p.requires_grad and p not in held for p in block.parameters())
    if others or own not in _STEP_OF or not set(inside.values()) <= set(_STEP_OF):
        return True  # unknown: a norm, or a block of another make
    return any(is_trained(m) and _STEP_OF[n] < _STEP_OF[own] for m, n in inside.items())


def _needs(layer: LoraLayer, x: bool) -> set[str]:
    """Return the gradients that a layer computes, by the names of ``ila_kernels.roofline``."""
    parts = {"lora_a": layer.lora_A, "lora_b": layer.lora_B}
    if isinstance(layer, MaskedLoraLayer):
        parts["gate"] = layer.lora_S
    needs = {
        name
        for name, entries in parts.items()
        if any(
            is_trained(entries[a])
            if isinstance(entries[a], nn.Module)
            else entries[a].requires_grad
            for a in layer.active_adapters
            if a in entries
        )
    }
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is not None and weight.requires_grad:
        needs.add("weight")
    return needs | ({"x"} if x else set())


def _saved(
    layer: LoraLayer, dtype: torch.dtype | None, path: str, needs: set[str], tokens: int
) -> int | None:
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    if isinstance(layer, ParamWrapper) and active and needs:
        return None  # PEFT keeps W + ΔW where a gradient passes, for a kept tensor too
    if not needs & {"lora_a", "lora_b", "gate", "weight"}:
        return 0
    if dtype is None or len(active) > 1 or (path == PEFT and not _is_plain(layer, active)):
        return None
    if not active:
        return saved_bytes("frozen", _problem(layer, dtype, tokens), needs)
    a, dropout = layer.lora_A[active[0]], layer.lora_dropout[active[0]]
    a = a.weight if isinstance(a, nn.Module) else a
    problem = _problem(layer, dtype, tokens, a.shape[0], a.dtype, getattr(dropout, "p", 0.0) > 0)
    return saved_bytes("peft" if path == PEFT else "addmm", problem, needs)


def _problem(layer, dtype, tokens, rank=1, adapter=None, dropout=False) -> Problem:
    width = (dtype if adapter is None else adapter).itemsize
    return Problem(
        tokens, layer.in_features, layer.out_features, rank, dtype.itemsize, width, dropout
    )


def _is_plain(layer: LoraLayer, active: list[str]) -> bool:
    """Tell whether PEFT's forward is its formula for ``nn.Linear`` and nothing else."""
    is_linear = isinstance(layer, Linear) and isinstance(layer.get_base_layer(), nn.Linear)
    return is_linear and not any(a in layer.lora_variant or layer.lora_bias[a] for a in active)


def _dtype(layer: LoraLayer, of_model: torch.dtype | None) -> torch.dtype | None:
    """Dtype of the activations: that of the base weight, or of the model where it is packed."""
    dtype = getattr(getattr(layer.get_base_layer(), "weight", None), "dtype", None)
    return dtype if dtype is not None and dtype.is_floating_point else of_model


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"

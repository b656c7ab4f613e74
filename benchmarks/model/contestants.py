"""The contestants at the level of a model: what each does to the same base, on the same batches.

All of them share one set of frozen weights in memory and hold the same adapter values, drawn from
the name of each parameter: two models that open the same layers compute the same loss.
"""

from __future__ import annotations

import copy
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import ila
from benchmarks.peers import liger
from benchmarks.peers.addmm import addmm_lora
from ila.masks.names import PEFT_PREFIX
from ila.models.blocks import find_blocks
from ila.models.edit import masked_layers

# σ of B: an update that is there, and small beside W as after some training.
B_STD = 0.01
DROPOUT = 0.05
BASE_DTYPE = "PEFT, base dtype"
FUSED_LOSS = "PEFT, fused loss"  # by the code of ours, so that nothing but the layers differs
LIGER = "PEFT, Liger"
# Ours -> what `impl="auto"` is to take on a GPU, whatever was tuned there.
KERNELS = {"ours": "eager", "ours, hybrid": "hybrid", "ours, Triton": "triton"}


@dataclass(frozen=True)
class Spec:
    """A contestant.

    Attributes:
        kind: ``"PEFT"``, ``"PEFT, base dtype"``, ``"PEFT, dropout"``, ``"PEFT, compiled"``,
            ``"PEFT, fused loss"``, ``"PEFT, Liger"``, ``"addmm"``, one of ``KERNELS`` or
            ``"frozen"``.
        share: Open share of the layers.
        position: ``"all"``, ``"top"``, ``"scattered"``, ``"bottom"`` or ``"learned"``.
        checkpoints: Gradient checkpointing, as transformers' Trainer turns it on.
        cache: Ours, with the states of the frozen prefix read from disk.
    """

    kind: str
    share: float = 1.0
    position: str = "all"
    checkpoints: bool = False
    cache: bool = False

    @property
    def name(self) -> str:
        where = "" if self.position == "all" else f", {self.share:.0%} {self.position}"
        return f"{self.kind}{where}" + ", checkpoints" * self.checkpoints + ", cache" * self.cache

    @property
    def opened(self) -> tuple[float, str]:
        """What decides the loss: two specs that agree in this compute the same."""
        return self.share, self.position

    @property
    def is_ours(self) -> bool:
        return self.kind.startswith("ours")


def share_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same frozen tensors."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def lora(rank: int, dropout: float = 0.0, targets: str | Sequence[str] = "all-linear", blocks=None):
    """PEFT's configuration of all linear layers, or of those named."""
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=blocks,
    )  # fmt: skip


def layer_names(base: nn.Module) -> list[str]:
    """Names of all layers, by position; nothing is computed."""
    with torch.device("meta"):
        empty = type(base)(base.config)
    return list(masked_layers(ila.attach(empty, lora(1)), "default"))


def mask_of(names: Sequence[str], share: float, position: str, learned=None) -> ila.LayerMask:
    """The mask that opens ``share`` of the layers at a position.

    >>> mask_of(["a", "b", "c", "d"], 0.5, "top").open, mask_of(["a", "b"], 0.5, "bottom").open
    (('c', 'd'), ('a',))
    """
    if position == "learned":
        return learned.top(share)
    order = list(range(len(names)))
    if position == "scattered":
        random.Random(0).shuffle(order)
    elif position == "bottom":
        order.reverse()
    elif position not in ("top", "all"):
        raise ValueError(f"position must be top, bottom, scattered or learned, got {position!r}")
    return ila.LayerMask(dict(zip(names, map(float, order), strict=True))).top(share)


def fill_adapters(model: nn.Module) -> None:
    """Draw A and B from their own names: A as a Kaiming init would, B ≠ 0."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            std = parameter.shape[1] ** -0.5 if ".lora_A." in name else B_STD
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(values)


def restricted(mask: ila.LayerMask, rank: int) -> LoraConfig:
    """What PEFT alone gives a user who knows the layers.

    ``layers_to_transform`` where they are whole blocks, else explicit names in ``target_modules``.
    """
    names = [name.removeprefix(PEFT_PREFIX) for name in mask.open]
    blocks = whole_blocks(mask)
    if blocks is not None:
        kinds = sorted({name.rpartition(".")[2] for name in names})
        return lora(rank, targets=kinds, blocks=blocks)
    return lora(rank, targets=names)


def whole_blocks(mask: ila.LayerMask) -> list[int] | None:
    """Numbers of the open blocks if each block is open or closed as a whole, else None."""

    def block(name: str) -> int:
        return int(re.search(r"\.layers\.(\d+)\.", name)[1])

    is_open = {block(name) for name in mask.open}
    return None if is_open & {block(name) for name in mask.closed} else sorted(is_open)


def build(spec: Spec, base: nn.Module, mask: ila.LayerMask, rank: int) -> nn.Module:
    """The model of a contestant, over the frozen tensors of ``base``."""
    model = share_copy(base)
    if spec.kind == "frozen":
        model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
        return model.train()
    if spec.kind == LIGER:
        liger.change(model)
    if spec.is_ours:
        model = ila.attach(model, lora(rank))
        if mask.closed:
            ila.apply_mask(model, mask)
    else:
        dropout = DROPOUT if spec.kind == "PEFT, dropout" else 0.0
        config = lora(rank, dropout) if spec.position == "all" else restricted(mask, rank)
        wide = spec.kind != BASE_DTYPE  # PEFT's default is fp32 adapters over a bf16 base
        model = get_peft_model(model, config, autocast_adapter_dtype=wide)
    fill_adapters(model)
    if spec.is_ours or spec.kind == FUSED_LOSS:
        ila.lean_head(model)
    if spec.kind == "addmm":
        use_addmm(model)
    if spec.checkpoints:
        model.activation_checkpointing_enable()
    if spec.kind == "PEFT, compiled":
        torch.compiler.reset()
        for block in find_blocks(model).layers:  # all blocks are one piece of compiled code
            block.compile()
    return model.train()


def use_addmm(model: nn.Module) -> None:
    """Let PEFT's layers compute by one ``autograd.Function`` each."""
    for layer in model.modules():
        if "default" in getattr(layer, "lora_A", ()):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scale, weight = layer.scaling["default"], layer.base_layer.weight

            def forward(x, weight=weight, a=a, b=b, scale=scale):
                return addmm_lora(x, weight, a, b, scale)

            layer.forward = forward

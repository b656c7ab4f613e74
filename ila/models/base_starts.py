"""Starts of an adapter that take a part of W along: PiSSA and OLoRA, under a mask.

    W = (W − s B₀A₀) + s B₀A₀   →   training   →   W + s (BA − B₀A₀)

PEFT puts the principal part of W into the adapter and leaves the rest as the base weight. A closed
layer has to be the pretrained layer, so only layers that hold the adapter start this way, after the
mask. A saved adapter holds BA − B₀A₀, of twice the rank, and belongs to the pretrained base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ila.models.edit import single_adapter

_STARTS = re.compile(r"pissa|pissa_niter_[1-9]\d*|olora")
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEPT = "_ila_base_start"


class Start(NamedTuple):
    """Factors of the part of W that a layer began with: A₀ (R, K) and B₀ (N, R)."""

    lora_a: Tensor
    lora_b: Tensor


def takes_base(init: object) -> bool:
    """Tell whether a value of ``init_lora_weights`` moves a part of W into the adapter.

    >>> takes_base("pissa_niter_16"), takes_base("gaussian"), takes_base(True)
    (True, False, False)
    """
    return isinstance(init, str) and _STARTS.fullmatch(init) is not None


def start_from_base(peft_model: PeftModel, init: str) -> tuple[str, ...]:
    """Let the layers that hold the active adapter start as PiSSA or OLoRA do, by PEFT's own code.

    Base weights change, and so do A and B; the output stays the same up to rounding. Call it after
    the mask and before the training.

    Args:
        peft_model: Model with a fresh adapter.
        init: ``"pissa"``, ``"pissa_niter_N"`` or ``"olora"``.

    Returns:
        Names of the layers.

    Raises:
        ValueError: If ``init`` is another word, a layer is of a kind that PEFT does not start so,
            or its weight is packed or belongs to another module too.
    """
    if not takes_base(init):
        raise ValueError(f"init must be pissa, pissa_niter_N or olora, got {init!r}")
    adapter = single_adapter(peft_model, None)
    layers = {n: m for n, m in peft_model.named_modules() if _holds(m, adapter)}
    for name, layer in layers.items():
        _check_startable(peft_model, name, layer, adapter, init)
    starts = {}
    for name, layer in layers.items():
        if init == "olora":
            layer.olora_init(adapter)
        else:
            layer.pissa_init(adapter, init)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        starts[name] = Start(a.detach().clone(), b.detach().clone())
    vars(peft_model)[_KEPT] = starts
    peft_model.peft_config[adapter].init_lora_weights = init
    return tuple(layers)


def _holds(module: nn.Module, adapter: str) -> bool:
    return isinstance(module, LoraLayer) and adapter in module.lora_A


def _check_startable(
    peft_model: PeftModel, name: str, layer: LoraLayer, adapter: str, init: str
) -> None:
    base = layer.get_base_layer()
    if not isinstance(layer, Linear) or type(base) is not nn.Linear:
        raise ValueError(
            f"init_lora_weights={init!r} needs plain linear layers, and {name} is a "
            f"{type(layer).__name__} over a {type(base).__name__}"
        )
    named = peft_model.named_parameters(remove_duplicate=False)
    others = [other for other, weight in named if weight is base.weight]
    if len(others) > 1:
        raise ValueError(
            f"init_lora_weights={init!r} changes the weight of {name}, which other modules use too "
            f"({', '.join(others)}); leave it out of target_modules"
        )
    most = min(base.weight.shape)
    if layer.r[adapter] > most:
        raise ValueError(
            f"rank must be ≤ {most} for init_lora_weights={init!r}: layer {name} has no larger "
            f"rank, got {layer.r[adapter]}"
        )


def starts_of(peft_model: nn.Module) -> Mapping[str, Start]:
    """Return layer name -> its start; empty for a model whose base weights are the pretrained."""
    return vars(peft_model).get(_KEPT, {})


def give_back_base(peft_model: PeftModel, folder: Path) -> None:
    """Rewrite a saved adapter so that it belongs to the pretrained base.

    A becomes [A; A₀] and B becomes [B, −B₀]; rank and alpha grow so that the scaling stays. The
    formula is that of PEFT's ``subtract_mutated_init``, which drops all tensors except A and B.

    Args:
        peft_model: Model of ``start_from_base``, or any other, whose files stay as they are.
        folder: Files of ``save_pretrained``.
    """
    starts = starts_of(peft_model)
    if not starts:
        return
    tensors = load_file(folder / _WEIGHTS)
    for name, start in starts.items():
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        a, b = tensors[key_a], tensors[key_b]
        tensors[key_a] = torch.cat([a, start.lora_a.to(a)])
        tensors[key_b] = torch.cat([b, -start.lora_b.to(b)], dim=1)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config["init_lora_weights"] = True
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def take_base(peft_model: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``give_back_base``: return the tensors of a file as this model holds them."""
    taken = dict(tensors)
    for name, start in starts_of(peft_model).items():
        rank = len(start.lora_a)
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if key_a in taken and len(taken[key_a]) == 2 * rank:
            taken[key_a], taken[key_b] = taken[key_a][:rank], taken[key_b][:, :rank]
    return taken

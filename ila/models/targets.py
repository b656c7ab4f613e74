"""Which modules an adapter's configuration names: all of those it was given, or the open ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn

from ila.masks.names import PEFT_PREFIX
from ila.models.tensors import parameter_name


def unmatched_targets(model: nn.Module, targets: object) -> list[str]:
    """Return the names in ``target_modules`` that are no module's, by PEFT's rule for a list.

    Args:
        model: The base model.
        targets: Of a ``LoraConfig``; a pattern or ``None`` has no names.
    """
    if targets is None or isinstance(targets, str):
        return []
    # A name may also mean a tensor: PEFT looks for experts among the parameters.
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    experts = () if getattr(model, "config", None) is None else _expert_names(model.config)
    return sorted(
        target
        for target in targets
        if target not in experts
        and not any(name == target or name.endswith(f".{target}") for name in known)
    )


def _expert_names(config: Any) -> tuple[str, ...]:
    """Names of layers that are parts of one tensor in transformers 5, and that PEFT translates."""
    if not hasattr(config, "num_experts_per_tok"):
        return ()
    return ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate")


def retarget(peft_model: PeftModel, adapter: str, all_there: bool) -> None:
    """Let the adapter's configuration name exactly the layers that hold it."""
    config = peft_model.peft_config[adapter]
    restore_targets(config)
    if all_there:
        return
    config._ila_target_modules = config.target_modules
    names = {name.removeprefix(PEFT_PREFIX): m for name, m in peft_model.named_modules()}
    held = {name for name, module in names.items() if _holds(module, adapter)}
    config.target_modules = {_short(name, held, names) for name in held}
    tensors = {name: module for name, module in names.items() if isinstance(module, ParamWrapper)}
    if any(adapter in getattr(module, "_closed", ()) for module in tensors.values()):
        config._ila_target_parameters = config.target_parameters
        config.target_parameters = {
            parameter_name(name, module)
            for name, module in tensors.items()
            if adapter in module.lora_A
        }


class Outside(NamedTuple):
    """Trained parameters of a model outside the layers of a mask.

    Attributes:
        parameters: Number of them.
        kinds: Last names of the modules that hold them.
    """

    parameters: int
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters are trained whatever a mask closes, in "
            f"{', '.join(self.kinds)}: a mask chooses among layers with an adapter"
        )


NOTHING_OUTSIDE = Outside(0, ())


def outside(model: nn.Module, layers: Mapping[str, nn.Module]) -> Outside:
    """Count the parameters outside the layers of a mask: embeddings, modules_to_save."""
    within = {parameter for layer in layers.values() for parameter in layer.parameters()}
    count, kinds = 0, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in within:
            count += parameter.numel()
            owner = re.split(r"\.(?:base_layer|lora_|modules_to_save|token_adapter)", name)[0]
            owner = name.rpartition(".")[0] if owner == name else owner
            kinds[owner.rpartition(".")[2]] = None
    return Outside(count, tuple(kinds))


def _holds(module: nn.Module, adapter: str) -> bool:
    """Tell whether an adapter of a module is there; tensors are in ``target_parameters``."""
    return (
        isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and adapter in {*module.lora_A, *module.lora_embedding_A}
    )


def _short(name: str, held: set[str], names: Iterable[str]) -> str:
    """PEFT saves an embedding beside its adapter where it finds the embedding's last name."""
    last = name.rpartition(".")[2]
    if last not in EMBEDDING_LAYER_NAMES:
        return name
    alike = {n for n in names if n == last or n.endswith(f".{last}")}
    return last if alike <= held else name


def restore_targets(config: Any) -> None:
    """Undo ``retarget`` in a configuration."""
    for name in ("target_modules", "target_parameters"):
        if f"_ila_{name}" in config.__dict__:
            setattr(config, name, config.__dict__.pop(f"_ila_{name}"))

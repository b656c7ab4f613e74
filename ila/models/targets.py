"""Which modules an adapter's configuration names: all of those it was given, or the open ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn


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


def retarget(peft_model: PeftModel, adapter: str, all_open: bool) -> None:
    """Let the adapter's configuration name exactly the layers that hold it."""
    config = peft_model.peft_config[adapter]
    restore_targets(config)
    if all_open:
        return
    config._ila_target_modules = config.target_modules
    names = {name.removeprefix("base_model.model."): m for name, m in peft_model.named_modules()}
    held = {name for name, module in names.items() if _holds(module, adapter)}
    config.target_modules = {_short(name, held, names) for name in held}


def _holds(module: nn.Module, adapter: str) -> bool:
    """Whether an adapter of a module is there; tensors of experts are named elsewhere."""
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
    """Let a configuration name what it named before ``retarget``."""
    if "_ila_target_modules" in config.__dict__:
        config.target_modules = config.__dict__.pop("_ila_target_modules")

"""Edit a model: ``attach``, ``convert``, ``restore``, ``apply_mask``.

Every edit reports its changes, an error leaves the model as it was, and ``restore`` gives back
PEFT's own layers with every adapter open.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ila.masks.mask import LayerMask
from ila.models.adalora import MaskedSvdLinear, close_ranks, open_ranks, recount
from ila.models.attention import fuse_qkv, unfuse_qkv
from ila.models.checkpointing import make_prefix_aware, undo_prefix_aware
from ila.models.class_swap import has_own_forward
from ila.models.edit_report import ConversionReport as ConversionReport
from ila.models.edit_report import MaskReport as MaskReport
from ila.models.layer import MaskedLoraLayer, MaskedLoraLinear
from ila.models.lean_head import plain_head
from ila.models.mlp import make_lean, make_plain
from ila.models.plain_blocks import plain_blocks, say_plain_blocks
from ila.models.sharded import gather_present, reshard
from ila.models.targets import (
    outside,
    restore_targets,
    retarget,
    unmatched_targets,
)
from ila.models.tensors import MaskedTensor, layer_name, named_layers
from ila.models.undo import Snapshot
from ila.models.untuned import read_verdicts_of

CLOSINGS = ("drop", "keep")

# They move part of W into B A, so that W is not there once the adapter is gone.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any):
    """Answer PEFT's custom-module look-up: ours for a base that we cover, else PEFT's choice."""
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if kwargs.pop("parameter_name", None) is not None or config.fan_in_fan_out:
        return None
    kinds = (kind for kind in _masked_classes() if kind is not MaskedTensor)
    masked = next((masked for masked in kinds if masked.covers(base)), None)
    return None if masked is None else masked(target, adapter_name, config=config, **kwargs)


def _masked_classes() -> tuple[type[MaskedLoraLayer], ...]:
    """Return our layer classes; with bitsandbytes' bases if a module has loaded bitsandbytes."""
    if "bitsandbytes" not in sys.modules:
        return (MaskedLoraLinear, MaskedSvdLinear, MaskedTensor)
    from ila.models.quantized import CLASSES

    return (MaskedLoraLinear, MaskedSvdLinear, MaskedTensor, *CLASSES)


def _keep_training_layout(model: nn.Module, keep: bool = True) -> None:
    if "bitsandbytes" in sys.modules:
        from ila.models.quantized import keep_training_layout

        keep_training_layout(model, keep)


def _check_matched(peft_model: PeftModel, lora_config: LoraConfig) -> None:
    if _masked_layers(peft_model):
        return
    layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
    kinds = [(type(m).__name__, type(m.get_base_layer()).__name__) for m in layers]
    found = {f"{peft} over {base}" if base != peft else peft for peft, base in kinds}
    raise ValueError(
        f"lora_config.target_modules={lora_config.target_modules!r} must match at least "
        f"one plain nn.Linear, 4-bit or int8 layer of bitsandbytes, or parameter; the layers it "
        f"matched became {', '.join(sorted(found))}"
    )


def attach(
    model: nn.Module, lora_config: LoraConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Add a LoRA adapter whose layers are ours where the base is ``nn.Linear`` or bitsandbytes'.

    Args:
        model: A base model, not a ``PeftModel``.
        lora_config: PEFT's configuration; it is copied, not changed.
        adapter_name: Name of the adapter.
        **kwargs: Passed to ``peft.get_peft_model``, e.g. ``low_cpu_mem_usage``,
            ``autocast_adapter_dtype``.

    Returns:
        The ``PeftModel``; ``model`` itself is modified in place, as PEFT does.

    Raises:
        TypeError: If ``model`` has adapters already or the configuration is not LoRA's.
        ValueError: If no module matches, or none that matches is a plain ``nn.Linear`` or a 4-bit
            or int8 layer of bitsandbytes.

    Warns:
        UserWarning: If some of ``target_modules`` match nothing. The log has a line, once, for each
            kind of attention block and MLP that computes layer by layer; ``explain`` repeats it.
    """
    _check_base(model)
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config must be a LoraConfig, got {type(lora_config).__name__}")
    config = copy.deepcopy(lora_config)
    config._register_custom_module({nn.Linear: _dispatch})
    unmatched = unmatched_targets(model, config.target_modules)
    before = Snapshot(model, copies=str(config.init_lora_weights).lower() == "olora")
    try:
        peft_model = get_peft_model(model, config, adapter_name=adapter_name, **kwargs)
        # PEFT asks for no custom module here: AdaLoRA's model, and the wrappers of tensors.
        unasked = SVDLinear if isinstance(config, AdaLoraConfig) else ParamWrapper
        _swap([m for m in peft_model.modules() if type(m) is unasked and _is_convertible(m)])
        _check_matched(peft_model, lora_config)
        if unmatched:
            warnings.warn(
                f"lora_config.target_modules names {', '.join(map(repr, unmatched))}, and the "
                "model has no such module; the other names are adapted",
                stacklevel=2,
            )
    except Exception:
        # PEFT replicates blocks, wraps modules one by one and checks each when its turn comes.
        before.restore()
        raise
    open_ranks(peft_model)
    make_prefix_aware(peft_model)
    make_lean(peft_model)
    fuse_qkv(peft_model)
    say_plain_blocks(peft_model)
    _keep_training_layout(peft_model)
    layers = _masked_layers(peft_model).values()
    read_verdicts_of(model, [each for each in layers if not isinstance(each, MaskedTensor)])
    return peft_model


def _check_base(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        raise TypeError("model must be a base model, got a PeftModel; use ila.convert(model)")
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper, PeftModel)
    for name, module in model.named_modules():
        if isinstance(module, adapted):
            raise TypeError(
                f"model must be a base model, got a {type(model).__name__} that has adapters "
                f"already ({name or 'it'} is a {type(module).__name__}); unload them first, or use "
                "ila.convert(model) to go on with them"
            )


def convert(model: nn.Module) -> ConversionReport:
    """Turn the LoRA linear layers of a model that has adapters into ``MaskedLoraLinear``.

    Layers over 4-bit and int8 bases of bitsandbytes become the class for theirs.

    The objects stay the same (their class changes), so parameters, optimisers, hooks and
    references to the layers stay valid.

    Args:
        model: A ``PeftModel``, or any module that contains PEFT LoRA layers.

    Returns:
        The names swapped, and the LoRA layers left with the reason.

    Raises:
        ValueError: If no layer can be swapped; the message says why for each kind.
    """
    swap, left = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        reason = _why_not_convertible(module)
        if reason is None:
            swap[layer_name(name, module)] = module
        else:
            left[layer_name(name, module)] = reason
    if not swap:
        reasons = sorted(set(left.values())) or ["it has no LoRA layers"]
        raise ValueError(f"model has no layer that can be converted: {'; '.join(reasons)}")
    _swap(swap.values())
    open_ranks(model)
    make_prefix_aware(model)
    _keep_training_layout(model)
    mlps, left_mlps = make_lean(model)
    attentions, left_attentions = fuse_qkv(model)
    left = left | left_mlps | left_attentions | plain_blocks(model)
    return ConversionReport(tuple(swap), left, tuple(mlps), tuple(attentions))


def _swap(modules: Iterable[LoraLayer]) -> None:
    for module in modules:
        module.__class__ = next(c for c in _masked_classes() if c.peft_class is type(module))
        module.prepare()


def _is_convertible(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and _why_not_convertible(module) is None


def _why_not_convertible(module: LoraLayer) -> str | None:
    if isinstance(module, MaskedLoraLayer):
        return "already converted"
    masked = next((c for c in _masked_classes() if c.peft_class is type(module)), None)
    if masked is None:
        return f"PEFT handles this kind of layer itself ({type(module).__name__})"
    if not masked.covers(module.base_layer):
        what = masked.plain.removeprefix("plain LoRA on ")
        return f"its base layer is a {type(module.base_layer).__name__}, not a plain {what}"
    if has_own_forward(module):
        return "its forward was replaced on the instance (a dispatch hook?)"
    return None


def restore(model: nn.Module) -> ConversionReport:
    """Undo ``attach``/``convert``, ``apply_mask``, ``lean_head``: PEFT's own layers, all open.

    Returns:
        The names restored.

    Raises:
        ValueError: If the model has neither a layer of this library nor a lean head.
    """
    layers, head = _masked_layers(model), plain_head(model)
    if not layers and head:
        return ConversionReport((), head=True)
    if not layers:
        raise ValueError("model has no MaskedLoraLinear layer to restore, and no lean head")
    reshard(model)
    for layer in layers.values():
        layer.strip()
        layer.__class__ = layer.peft_class
    gather_present(model)
    close_ranks(model)
    mlps, attentions = make_plain(model), unfuse_qkv(model)
    for config in getattr(model, "peft_config", {}).values():
        restore_targets(config)
        if isinstance(config, LoraConfig) and config._custom_modules:
            config._custom_modules.pop(nn.Linear, None)
    undo_prefix_aware(model)
    _keep_training_layout(model, keep=False)
    return ConversionReport(tuple(layers), {}, tuple(mlps), tuple(attentions), head)


def masked_layers(model: nn.Module, adapter: str) -> dict[str, MaskedLoraLayer]:
    """Layer name -> layer, for every ``MaskedLoraLayer`` with this adapter, open or closed.

    The name of a layer is that of its module, or of the tensor that PEFT adapts in it.
    """
    return {
        name: layer
        for name, layer in _masked_layers(model).items()
        if adapter in layer.lora_A or layer.is_closed(adapter)
    }


def _masked_layers(model: nn.Module) -> dict[str, MaskedLoraLayer]:
    return named_layers(model, MaskedLoraLayer)


def single_adapter(peft_model: PeftModel, adapter_name: str | None) -> str:
    """Return the adapter of this name; ``None`` means the active one, if there is one.

    Raises:
        TypeError: If ``peft_model`` is not a ``PeftModel``.
        ValueError: If there is no such adapter, or several are active and none is named.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model must be a PeftModel, got {type(peft_model).__name__}")
    if adapter_name is None:
        active = list(peft_model.active_adapters)
        if len(active) != 1:
            raise ValueError(f"adapter_name must be given: the active adapters are {active}")
        adapter_name = active[0]
    if adapter_name not in peft_model.peft_config:
        known = sorted(peft_model.peft_config)
        raise ValueError(f"adapter_name must be one of {known}, got {adapter_name!r}")
    return adapter_name


def apply_mask(
    peft_model: PeftModel,
    mask: LayerMask,
    *,
    closed: str = "drop",
    adapter_name: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> MaskReport:
    """Close the layers that the mask closes and open the others.

    With ``closed="drop"`` a closed layer computes its base layer and nothing else. Its adapter
    weights are set aside (``restore``, or a mask that opens it, brings them back), and
    ``save_pretrained`` does not write them. The adapter's ``target_modules`` name the open layers
    only, so the saved adapter loads in plain PEFT.

    With ``closed="keep"`` a closed layer keeps its update and learns no more: the update stays in
    the model and in the saved adapter, and has no gradient, no optimiser state and no dropout.
    Blocks below the lowest open layer are a frozen prefix like any other.

    Args:
        peft_model: A model from ``attach``, or converted by ``convert``.
        mask: A mask with the names of this model's layers: ``MaskedLoraLinear`` ones, and the
            tensors of experts and routers that PEFT adapts (``ila.models.tensors``).
        closed: ``"drop"`` or ``"keep"``; it holds for every layer that the mask closes.
        adapter_name: The adapter to mask; ``None`` means the active one.
        optimizer: If given, the parameters and state of closed layers are removed from it.

    Returns:
        Which layers are open and closed now.

    Raises:
        ValueError: If the mask is for another model (names unknown or missing), if it opens a
            layer whose parameters the given ``optimizer`` does not hold, or if it closes a layer
            and the adapter's configuration trains base biases, or changes base weights and the
            closed layers are dropped. If ``closed`` is another word.
        RuntimeError: If the adapter is merged.
    """
    if closed not in CLOSINGS:
        raise ValueError(f"closed must be one of {CLOSINGS}, got {closed!r}")
    adapter = single_adapter(peft_model, adapter_name)
    layers = masked_layers(peft_model, adapter)
    _check_mask(layers, mask, adapter)
    if mask.closed:
        _check_closable(peft_model.peft_config[adapter], closed)
    if any(adapter in layer.merged_adapters for layer in layers.values()):
        raise RuntimeError(f"adapter {adapter!r} is merged; unmerge it before applying a mask")
    opening = [layers[name] for name in mask.open if not layers[name].is_open(adapter)]
    if optimizer is not None and opening:
        raise ValueError(
            f"optimizer does not hold the parameters of {len(opening)} layers that the mask opens; "
            "apply the mask first, then create the optimizer"
        )
    reshard(peft_model)
    for layer in opening:
        layer.open(adapter)
    dropped = set()
    for name in mask.closed:
        dropped |= set(layers[name].adapter_parameters(adapter))
        layers[name].keep(adapter) if closed == "keep" else layers[name].close(adapter)
    gather_present(peft_model)
    if optimizer is not None:
        _forget(optimizer, dropped)
    retarget(peft_model, adapter, all_there=closed == "keep" or not mask.closed)
    recount(peft_model, adapter)
    beside = outside(peft_model, layers)
    return MaskReport(adapter, tuple(mask.open), tuple(mask.closed), closed, beside)


def _check_mask(layers: Mapping[str, nn.Module], mask: LayerMask, adapter: str) -> None:
    if not layers:
        raise ValueError(
            f"peft_model has no MaskedLoraLinear layer with adapter {adapter!r}; "
            "use ila.attach or ila.convert first"
        )
    unknown = [name for name in mask.scores if name not in layers]
    missing = [name for name in layers if name not in mask.scores]
    if unknown or missing:
        examples = [f"unknown {name!r}" for name in unknown[:1]]
        examples += [f"missing {name!r}" for name in missing[:1]]
        raise ValueError(
            f"mask must name the {len(layers)} LoRA layers of this model; {len(unknown)} of its "
            f"names are unknown here and {len(missing)} are missing ({', '.join(examples)}): it "
            "was learned on another model or other target_modules"
        )


def _check_closable(config: Any, closed: str) -> None:
    """Raise unless a closed layer learns nothing and is, if dropped, the pretrained layer."""
    if config.bias != "none":
        raise ValueError(
            f"bias must be 'none' to close layers, got {config.bias!r}: it trains the base bias of "
            "closed layers too, which plain PEFT does not load without an adapter beside it"
        )
    if closed == "keep":
        return
    init = str(config.init_lora_weights).lower()
    kasa = getattr(config, "kasa_config", None)  # of PEFT 0.21 and newer
    if init.startswith(_INITS_THAT_CHANGE_THE_BASE) or kasa is not None:
        given = f"init_lora_weights={config.init_lora_weights!r}" if kasa is None else "kasa_config"
        raise ValueError(
            f"{given} must leave base weights alone to close layers: a layer closed now would not "
            "be the pretrained layer"
        )


def _forget(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in parameters]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)

"""Fine-tune chosen layers in full: W itself trains in place of an adapter, ΔW = W' − W.

A mask means the same as for adapters: ΔW of a closed layer is 0, its weight is frozen, and backward
makes no gradient for it.

Weights are float32 in training and rounded to the dtype of x at each use: AdamW moves a weight by
about the learning rate, and bf16 cannot hold a step below 1/512 of the weight. Files keep the old
dtype. An open parameter costs 16 bytes in training (weight, gradient, two moments) and 2 to 4 in
the result, which holds the changed weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

from ila.boundary import reading
from ila.masks.mask import LayerMask
from ila.masks.names import PEFT_PREFIX
from ila.models.edit import apply_mask, masked_layers, single_adapter
from ila.models.layer import MaskedLoraLayer
from ila.models.tensors import MaskedTensor
from ila.runs.metrics import LayerCounts

CHANGED_FILE = "changed.safetensors"


class OpenLinear(nn.Linear):
    """A linear layer that trains: float32 parameters, computed in the dtype of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + bias in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


@dataclass(frozen=True)
class OpenLayers:
    """A base model with some of its linear layers open, ready for ``ila.training.train.train``.

    Attributes:
        model: Base model; only parameters of open layers require grad.
        names: Names of the open layers, as in ``model.named_modules()``.
        total: Number of open and closed layers.
        dtypes: Parameter name -> dtype of the base, which files keep.
    """

    model: nn.Module
    names: tuple[str, ...]
    total: int
    dtypes: Mapping[str, torch.dtype]

    def counts(self) -> LayerCounts:
        """Return how many layers are open and how many parameters are trained."""
        trainable = sum(self.model.get_parameter(name).numel() for name in self.dtypes)
        return {
            "open_modules": len(self.names),
            "total_modules": self.total,
            "fraction_open": len(self.names) / self.total,
            "trainable_parameters": trainable,
            "full": True,
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return the changed weights in the dtypes of the base."""
        return {
            name: self.model.get_parameter(name).detach().to("cpu", dtype).contiguous()
            for name, dtype in self.dtypes.items()
        }

    def save(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write the result of ``state`` into ``folder``."""
        save_file(dict(state), folder / CHANGED_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read a folder that ``save`` wrote."""
        load_changed(self.model, folder)

    def trainer_class(self, kind: type[Trainer] = Trainer) -> type[Trainer]:
        """Return a ``Trainer`` whose checkpoints hold the open weights alone."""
        if kind is Trainer:
            return OpenTrainer
        return type(f"Open{kind.__name__}", (OpenTrainer, kind), {})


def open_layers(peft_model: PeftModel, mask: LayerMask | None = None) -> OpenLayers:
    """Remove the adapter of a model and open the layers of a mask, or all without a mask.

    Args:
        peft_model: Model of ``ila.attach``, for its choice of layers. The function drops the
            adapter and changes the base model in place.
        mask: Mask over these layers, learned in any way.

    Returns:
        The open layers.

    Raises:
        ValueError: If the mask is for another model, or an open layer is packed (it has no W to
            train) or shares its weight with another module, as an output layer may share with the
            embedding.
    """
    found = masked_layers(peft_model, single_adapter(peft_model, None))
    tensors = {name for name, layer in found.items() if isinstance(layer, MaskedTensor)}
    layers = {name: layer for name, layer in found.items() if name not in tensors}
    opened = list(layers) if mask is None else mask.open
    _check(peft_model, {name: found[name] for name in opened if name in found})
    if mask is not None:
        apply_mask(peft_model, _with_closed(mask, tensors))
    model = peft_model.unload()
    vars(model).pop("peft_config", None)
    names = tuple(name.removeprefix(PEFT_PREFIX) for name in opened)
    modules = dict(model.named_modules())
    model.requires_grad_(False)
    dtypes = {}
    for name in names:
        module = modules[name]
        module.__class__ = OpenLinear
        for key, parameter in module.named_parameters(recurse=False):
            dtypes[f"{name}.{key}"] = parameter.dtype
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
    return OpenLayers(model, names, len(layers), dtypes)


def _with_closed(mask: LayerMask, names: Iterable[str]) -> LayerMask:
    """Return a mask that closes layers which it does not know."""
    unknown = [name for name in names if name not in mask.scores]
    scores, gates = dict.fromkeys(unknown, 0.0), dict.fromkeys(unknown, False)
    return LayerMask({**mask.scores, **scores}, {**mask.gates, **gates})


def load_changed(model: nn.Module, folder: str | Path) -> None:
    """Put the changed weights of a run into its base model.

    Args:
        model: Base model of the run.
        folder: Folder of ``ila train --full``.

    Raises:
        FileNotFoundError: If the folder holds no changed weights.
        ValueError: If they are damaged or belong to another model; the model then stays as it was.
    """
    _put(model, _read(Path(folder) / CHANGED_FILE))


def _read(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: is it finished?")
    with reading(f"{file} are damaged", "the weights in"):
        return load_file(file)


def _put(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        own = parameters.get(name)
        if own is None or own.shape != value.shape:
            has = "no such parameter" if own is None else f"shape {tuple(own.shape)}"
            raise ValueError(
                f"model must be the one that was trained: {name} has shape {tuple(value.shape)} "
                f"in the run, and here {has}"
            )
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _check(model: nn.Module, layers: Mapping[str, MaskedLoraLayer]) -> None:
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if isinstance(layer, MaskedTensor):
            raise ValueError(
                f"layer {name!r} must be a plain nn.Linear to train its weight, and is a tensor "
                "that PEFT adapts; close it, or train adapters"
            )
        if type(base) is not nn.Linear:
            raise ValueError(
                f"layer {name!r} must be a plain nn.Linear to train its weight, got "
                f"{type(base).__name__}; load the model without load_in"
            )
        shared = holders[id(base.weight)]
        if len(shared) > 1:
            raise ValueError(f"layer {name!r} must not share its weight, but {shared} are one")


class OpenTrainer(Trainer):
    """Save and load the parameters that require grad, where Trainer takes the whole model."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self._names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        if self.is_fsdp_enabled:
            raise ValueError(
                "full training of layers cannot shard them (FSDP): its checkpoints hold whole "
                "weights; use several processes without FSDP, or adapters"
            )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        weights = {name: model.get_parameter(name).detach().cpu() for name in self._names}
        save_file(weights, folder / CHANGED_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        _put(model, _read(Path(resume_from_checkpoint) / CHANGED_FILE))

"""The states of an adapter in a layer, beside PEFT's: open, set aside, kept.

Two kinds of zero. A *closed* layer has its adapter set aside (``close``): its parameters are no
longer registered, so no optimiser, checkpoint, state dict, merge or backward sees them, and the
layer is the base layer, bit for bit. A *score* is a parameter s of an open layer, γ = σ(s).

A *kept* layer is closed in another way (``keep``): its adapter stays, computes and is saved, and
learns no more. It is a constant, so it has no dropout either.

PEFT activates, scales, deletes, moves and saves all adapters of a layer: the ones set aside too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn


def is_sharded(weight: torch.Tensor) -> bool:
    """Tell whether FSDP2 holds a part of this weight on each process."""
    return type(weight) is not nn.Parameter and hasattr(weight, "placements")


def _parameters_in(parts: Mapping[str, object]) -> Iterator[nn.Parameter]:
    for value in parts.values():
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, nn.Parameter):
            yield value


def _move(value: nn.Module | torch.Tensor, device: torch.device) -> None:
    """Move parameters in place: references to them stay valid."""
    if isinstance(value, nn.Module):
        value.to(device)
    else:
        value.data = value.data.to(device)


class LayerStates:
    """An adapter may be set aside or kept; mixed in before a layer class of PEFT's.

    Attributes:
        lora_S: Adapter -> score s, while a search trains it.
        _closed: Adapter -> its entries in PEFT's dictionaries, while it is set aside.
        _kept: Names of the adapters that are frozen in place.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_S")

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add or replace an adapter, as PEFT does; an adapter set aside by that name is dropped."""
        self.prepare()
        self._closed.pop(adapter_name, None)
        self._kept.discard(adapter_name)
        super().update_layer(adapter_name, *args, **kwargs)

    def prepare(self) -> None:
        """Give the layer the state that PEFT's class lacks; nothing if it is there."""
        if "_closed" not in self.__dict__:
            self._closed: dict[str, dict[str, Any]] = {}
            self._kept: set[str] = set()
            self.lora_S = nn.ParameterDict()
        # Variants such as DoRA give an instance a tuple of its own.
        if "lora_S" not in self.adapter_layer_names:
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_S")

    def strip(self) -> None:
        """Open every adapter and remove the additions of ``prepare`` and of the search."""
        for adapter in (*self._closed, *self._kept):
            self.open(adapter)
        del self._closed, self._kept, self.lora_S
        if "adapter_layer_names" in self.__dict__:
            names = (name for name in self.adapter_layer_names if name != "lora_S")
            self.adapter_layer_names = tuple(names)

    def close(self, adapter: str) -> None:
        """Set an adapter aside: the layer computes as if it never had it.

        Raises:
            RuntimeError: If the adapter is merged into the base weight.
        """
        if adapter in self.merged_adapters:
            raise RuntimeError(f"adapter {adapter!r} is merged; unmerge it before closing layers")
        if adapter not in self.lora_A:
            return
        if adapter in self._kept:
            self.open(adapter)
        parts = {}
        for name in (*self.adapter_layer_names, *self.other_param_names, "lora_variant"):
            entries = getattr(self, name)
            if adapter in entries:
                parts[name] = entries[adapter]
                del entries[adapter]
        for parameter in _parameters_in(parts):
            parameter.grad = None
        self._closed[adapter] = parts

    def keep(self, adapter: str) -> None:
        """Freeze an adapter in place: it computes and is saved, and learns no more.

        Raises:
            RuntimeError: If the adapter is merged into the base weight.
        """
        if adapter in self.merged_adapters:
            raise RuntimeError(f"adapter {adapter!r} is merged; unmerge it before closing layers")
        if adapter in self._closed:
            self.open(adapter)
        if adapter in self.lora_A:
            self._kept.add(adapter)
            self._require_grad(adapter, False)

    def _require_grad(self, adapter: str, required: bool) -> None:
        """Let the parameters of an adapter require grad, except the ones that PEFT keeps frozen."""
        frozen = self.frozen_peft_weight_names.get(adapter, ())
        for name in self.adapter_layer_names:
            entries = getattr(self, name)
            if adapter in entries:
                entry = entries[adapter]
                entry.requires_grad_(required and name not in frozen)
                for parameter in [entry] if isinstance(entry, nn.Parameter) else entry.parameters():
                    parameter.grad = None

    def open(self, adapter: str) -> None:
        """Let an adapter learn again: one set aside is put back as it was when it was closed.

        It comes to the device of the base layer.

        Raises:
            RuntimeError: If the base layer was sharded since: no code would add up the gradients
                of the processes for an adapter put back now.
        """
        if adapter in self._closed and is_sharded(self.weight):
            parameters = _parameters_in({"lora_A": self._closed[adapter]["lora_A"]})
            if not any(is_sharded(parameter) for parameter in parameters):
                raise RuntimeError(
                    f"adapter {adapter!r} was closed before the model was sharded and cannot be "
                    "opened after; load the model again and apply the mask first"
                )
        if adapter in self._kept:
            self._kept.discard(adapter)
            self._require_grad(adapter, adapter in self.active_adapters)
        parts = self._closed.pop(adapter, None)
        if parts is None:
            return
        # Not _move_adapter_to_device_of_base_layer: that rounds fp32 adapters to a bf16 base.
        device = self.weight.device
        for name, value in parts.items():
            if isinstance(value, nn.Module):
                value.train(self.training)
            if isinstance(value, (nn.Module, torch.Tensor)) and device.type != "meta":
                _move(value, device)
            getattr(self, name)[adapter] = value

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, as PEFT does; adapters set aside follow in requiring grad."""
        super().set_adapter(adapter_names, inference_mode)
        for adapter in self._kept:
            self._require_grad(adapter, False)
        for adapter, parts in self._closed.items():
            trainable = adapter in self.active_adapters and not inference_mode
            frozen = self.frozen_peft_weight_names.get(adapter, ())
            for name in self.adapter_layer_names:
                if name in parts:
                    parts[name].requires_grad_(trainable and name not in frozen)

    def _all_available_adapter_names(self) -> list[str]:
        # PEFT picks the next active adapter from these; all layers of a model must pick the same.
        return sorted({*super()._all_available_adapter_names(), *self._closed})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # ``to``, ``half`` and ``cuda`` reach an adapter that is set aside as well. It is
        # moved and not emptied: nothing else holds its weights.
        for parts in self._closed.values():
            for parameter in _parameters_in(parts):
                probe = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
                if probe.device.type != "meta":
                    parameter.data = parameter.data.to(probe.device, probe.dtype)
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return the state; a closed head has the names of a head that was never adapted.

        PEFT saves a head beside an adapter whose vocabulary grew, and finds it again by its name.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self._is_bare_embedding(prefix):
            for name in [name for name in state if name.startswith(f"{prefix}base_layer.")]:
                state[prefix + name.removeprefix(f"{prefix}base_layer.")] = state.pop(name)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self._is_bare_embedding(prefix):
            for name in self.get_base_layer().state_dict():
                if prefix + name in state_dict:
                    state_dict[f"{prefix}base_layer.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _is_bare_embedding(self, prefix: str) -> bool:
        """Tell whether all adapters of an embedding or a head are set aside."""
        name = prefix.removesuffix(".").rpartition(".")[2]
        return name in EMBEDDING_LAYER_NAMES and bool(self._closed) and not self.lora_A

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set a scale, as PEFT does, of an adapter that is set aside too."""
        with self._whole():
            super().set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters, as PEFT does, of those set aside too."""
        with self._whole():
            super().scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, as PEFT does, of those set aside too."""
        with self._whole():
            super().unscale_layer(scale)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Put the numbers of adapters set aside beside the others, where PEFT reads them."""
        closed = {adapter: parts for adapter, parts in self._closed.items() if "scaling" in parts}
        numbers = {"r", "lora_alpha", "scaling", "use_rslora"}
        for adapter, parts in closed.items():
            self.lora_A[adapter] = parts["lora_A"]
            for name in numbers & parts.keys():
                getattr(self, name)[adapter] = parts[name]
        try:
            yield
        finally:
            for adapter, parts in closed.items():
                del self.lora_A[adapter]
                for name in numbers & parts.keys():
                    parts[name] = getattr(self, name).pop(adapter)

    def is_closed(self, adapter: str) -> bool:
        """Tell whether this adapter is set aside here."""
        return adapter in self._closed

    def is_kept(self, adapter: str) -> bool:
        """Tell whether this adapter is frozen in place here."""
        return adapter in self._kept

    def is_open(self, adapter: str) -> bool:
        """Tell whether this adapter is here and neither set aside nor frozen in place."""
        return adapter in self.lora_A and adapter not in self._kept

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, open or closed."""
        self._closed.pop(adapter_name, None)
        self._kept.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def adapter_parameters(self, adapter: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter that is here, open or kept."""
        held = {name: getattr(self, name) for name in self.adapter_layer_names}
        here = {name: entries[adapter] for name, entries in held.items() if adapter in entries}
        return list(_parameters_in(here))

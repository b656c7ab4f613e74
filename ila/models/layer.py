"""``MaskedLoraLinear``: PEFT's ``lora.Linear`` with ``y = x Wᵀ + bias + γα (x̂ Aᵀ) Bᵀ`` as one op.

Our code is in ``MaskedLoraLayer``, a mixin for PEFT's layer class of each kind of base: here
``nn.Linear``, in ``ila.models.quantized`` the layers of bitsandbytes. They are subclasses, so that
all of PEFT's functions work on them. ``forward`` takes the op where the op covers the case, the
bare linear where no adapter is there, and PEFT's own ``forward`` everywhere else; ``route`` says
which and why.

Two kinds of zero. A *closed* layer has its adapter set aside (``close``): its parameters are no
longer registered, so no optimiser, checkpoint, state dict, merge or backward sees them, and the
layer is the base layer, bit for bit. A *score* is a parameter s of an open layer, γ = σ(s).

A *kept* layer is closed in another way (``keep``): its adapter stays, computes and is saved, and
learns no more. It is a constant, so it has no dropout either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn

from ila.models.recomputation import Seen, has_hooks
from ila.models.transforms import under_transform
from ila_kernels import masked_lora_linear
from ila_kernels.quant import PackedWeight

FUSED, BARE, PEFT = "fused", "bare", "peft"


class Route(NamedTuple):
    """Which code computes a layer, why, and with which adapter (``None`` unless fused)."""

    path: str
    reason: str
    adapter: str | None = None


# Parts of a layer that the fused path reads: base layer, W, A, B, dropout.
_Parts = tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, nn.Module]


class Operands(NamedTuple):
    """Operands of the op for a layer; a layer without an adapter has no A, B and gate."""

    weight: torch.Tensor | PackedWeight
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    gate: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float = 1.0
    dropout_p: float = 0.0


class Recipe(NamedTuple):
    """Operands of ``swiglu_product``, which makes the x of down_proj again."""

    made: Seen
    pre: torch.Tensor
    up: torch.Tensor
    activation: str


class Shared(Protocol):
    """A joint computation of a layer while its block runs: ``ila.models.shared_input``."""

    def output_of(self, layer: MaskedLoraLayer, x: torch.Tensor) -> torch.Tensor | None:
        """Return y of a layer; ``None`` where it has to compute for itself."""


_DISABLED = Route(PEFT, "adapters are disabled")
_MERGED = Route(PEFT, "an adapter is merged into the base weight")
_NO_ADAPTER = Route(BARE, "no active adapter in this layer")
_SEVERAL = Route(PEFT, "several adapters are active")
_LORA_BIAS = Route(PEFT, "lora_bias=True")
_BASE_TYPE = Route(PEFT, "the base layer is not a plain nn.Linear")
_HOOKS = Route(PEFT, "the base layer or an adapter module has hooks or a forward of its own")
_ADAPTER_TYPE = Route(PEFT, "an adapter module is not a plain nn.Linear or dropout")
_TRANSFORM = Route(PEFT, "a transform of torch.func runs here")
# Outside of forward only, with FSDP2: it gathers weights before a block runs.
SHARDED = Route(PEFT, "a weight is sharded here (DTensor)")


def _weight(module: nn.Linear) -> torch.Tensor:
    # Where a sharding wrapper keeps the parameter elsewhere, the attribute still answers.
    weight = module._parameters.get("weight")
    return module.weight if weight is None else weight


def _is_sharded(weight: torch.Tensor) -> bool:
    return type(weight) is not nn.Parameter and hasattr(weight, "placements")


def _dropout_of(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


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


class MaskedLoraLayer:
    """The gate and the closing of a LoRA linear layer; mixed in before a layer class of PEFT's.

    Shapes: x (..., K) -> y (..., N), dtype of the base layer's output.

    Attributes:
        peft_class: PEFT's class for this kind of base layer, the other parent.
        plain: Name of the computation of the fused path.
        _shared_input: The group of layers that this one computes with now, while its block runs;
            copies and pickles have none.
    """

    peft_class: type[LoraLayer]
    plain: str
    _shared_input: Shared | None = None
    _held = "_modules"  # where torch keeps the entries of lora_A
    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_S")

    @staticmethod
    def covers(base: nn.Module) -> bool:
        """Tell whether the op computes a base layer of this kind."""
        raise NotImplementedError

    def base_weight(
        self, base: nn.Module, weight: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor | PackedWeight:
        """W of the base layer, whose parameter is ``weight``, as the op takes it."""
        raise NotImplementedError

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
            self._shared_input = None
        # Variants such as DoRA give an instance a tuple of its own.
        if "lora_S" not in self.adapter_layer_names:
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_S")

    def strip(self) -> None:
        """Open every adapter and remove the additions of ``prepare`` and of the search."""
        for adapter in (*self._closed, *self._kept):
            self.open(adapter)
        del self._closed, self._kept, self.lora_S
        self.__dict__.pop("_shared_input", None)
        if "adapter_layer_names" in self.__dict__:
            names = (name for name in self.adapter_layer_names if name != "lora_S")
            self.adapter_layer_names = tuple(names)

    def join(self, shared: Shared | None) -> None:
        """Compute with other layers from now on, or alone again."""
        object.__setattr__(self, "_shared_input", shared)  # nn.Module's takes 1 µs

    def __getstate__(self) -> dict[str, object]:
        """Return the state for copies and pickles, without the state of a running forward."""
        return {**self.__dict__, "_shared_input": None}

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
        if adapter in self._closed and _is_sharded(self.weight):
            parameters = _parameters_in({"lora_A": self._closed[adapter]["lora_A"]})
            if not any(_is_sharded(parameter) for parameter in parameters):
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

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (R, K) and B (N, R) of an adapter; the update is ``scaling[adapter] B A``."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def by_expert(self, b: torch.Tensor) -> torch.Tensor:
        """Return B (N, R), or its gradient, in the layout of ``factors``."""
        return b

    def linear_part(self, adapter: str) -> nn.Parameter:
        """Return a parameter P in which the update is linear: γ dL/dγ = ⟨dL/dP, P⟩."""
        return self.lora_B[adapter].weight

    def why_not_scored(self) -> str | None:
        """Say why no gate can scale the update of this layer; None if one can."""
        route = self.route()
        # FSDP gathers a sharded layer before it runs; forward raises if it did not.
        return None if route.path == FUSED or route is SHARDED else route.reason

    def gate(self, adapter: str) -> torch.Tensor | None:
        """γ = σ(s), one element, or ``None`` (γ = 1) where the adapter has no score."""
        score = self._modules["lora_S"]._parameters.get(adapter)
        return None if score is None else torch.sigmoid(score)

    def route(self) -> Route:
        """Say which code computes this layer as it stands, and why."""
        return self._resolve()[0]

    def _resolve(self) -> tuple[Route, _Parts | None]:
        """Return the route and the operands of the fused path; this runs in every forward."""
        if self._disable_adapters:
            return _DISABLED, None
        if self.merged_adapters:
            return _MERGED, None
        # Attribute access on a module takes 0.6 µs: registered ones are read from _modules. And the
        # property active_adapters takes 0.4, filtering its one name as much again.
        modules = self._modules
        adapters_a = getattr(modules["lora_A"], self._held)
        active = self._active_adapter
        if type(active) is str:
            active = [active]
        if len(active) != 1:
            active = [name for name in active if name in adapters_a]
            if len(active) > 1:
                return _SEVERAL, None
        if not active or active[0] not in adapters_a:
            return _NO_ADAPTER, None
        return self._parts_of(active[0])

    def _parts_of(self, adapter: str) -> tuple[Route, _Parts | None]:
        """Return the route and the operands of the fused path for the one active adapter."""
        if adapter in self.lora_variant:
            variant = type(self.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
            return Route(PEFT, f"LoRA variant {variant}"), None
        if self.lora_bias[adapter]:
            return _LORA_BIAS, None
        modules = self._modules
        a, b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return _ADAPTER_TYPE, None
        return self._fused(adapter, _weight(a), _weight(b), a, b)

    def _fused(
        self, adapter: str, lora_a: torch.Tensor, lora_b: torch.Tensor, *watched: nn.Module
    ) -> tuple[Route, _Parts | None]:
        """Return the fused route if the base, the dropout and the ``watched`` modules allow it."""
        modules = self._modules
        base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[adapter]
        if not self.covers(base) or self.fan_in_fan_out:
            return _BASE_TYPE, None
        if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1):
            return _ADAPTER_TYPE, None
        if has_hooks(base, dropout, *watched):
            return _HOOKS, None
        if under_transform():
            return _TRANSFORM, None
        weight = _weight(base)
        if _is_sharded(weight) or _is_sharded(lora_a):
            return SHARDED, None
        return Route(FUSED, self.plain, adapter), (base, weight, lora_a, lora_b, dropout)

    def forward(
        self, x: torch.Tensor, *args: Any, swiglu: Recipe | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the layer by its route; extra arguments (``adapter_names`` …) take PEFT's.

        ``swiglu``, from ``LeanMLP``, holds the tensors that make x again; only the op reads it.
        """
        shared = self._shared_input
        if shared is not None and not args and not kwargs:
            y = shared.output_of(self, x)
            if y is not None:
                return y
        route, parts = self._resolve()
        if parts is not None and not args and not kwargs:
            weight, a, b, gate, bias, scale, dropout_p = self._operands(x, route.adapter, parts)
            recipe = {}
            if swiglu is not None and swiglu.made.is_now(x, self):
                recipe = {"swiglu": (swiglu.pre, swiglu.up), "activation": swiglu.activation}
            return masked_lora_linear(
                *(x, weight, a, b, gate),
                bias=bias,
                scale=scale,
                dropout_p=dropout_p,
                **recipe,
            )
        if route.path == BARE and not kwargs:
            return self.base_layer(x, *args)
        if self.lora_S and not self._disable_adapters:
            raise RuntimeError(
                "a layer that is being scored must take the fused path, but it takes PEFT's: "
                f"{route.reason if route.path == PEFT else 'extra forward arguments'}"
            )
        return super().forward(x, *args, **kwargs)

    def operands(self, x: torch.Tensor | None) -> Operands | None:
        """Return the operands of the op for this layer; ``None`` where other code computes it.

        Without x, W is the base layer's parameter as it is stored, and nothing is prepared for it.
        """
        route, parts = self._resolve()
        if parts is not None:
            return self._operands(x, route.adapter, parts)
        base = self.base_layer
        if route.path != BARE or type(base) is not nn.Linear or has_hooks(base):
            return None
        weight = _weight(base)
        return None if _is_sharded(weight) else Operands(weight, None, None, None, base.bias)

    def _operands(self, x: torch.Tensor | None, adapter: str, parts: _Parts) -> Operands:
        base, weight, lora_a, lora_b, dropout = parts
        gate, scale = self.gate(adapter), self.scaling[adapter]
        if isinstance(scale, torch.Tensor):  # PEFT's hot-swapping changes it between compiled calls
            scale = scale.to(lora_a.device)
            gate, scale = scale if gate is None else gate * scale, 1.0
        return Operands(
            weight if x is None else self.base_weight(base, weight, x),
            lora_a,
            lora_b,
            gate,
            base._parameters["bias"] if "bias" in base._parameters else base.bias,
            scale,
            0.0 if adapter in self._kept else _dropout_of(dropout),
        )


class MaskedLoraLinear(MaskedLoraLayer, Linear):
    """A LoRA linear layer with a gate, a drop-in for ``peft.tuners.lora.layer.Linear``.

    Args: the arguments of PEFT's class: ``base_layer``, ``adapter_name``, ``config``, ``r``,
    ``lora_alpha``, and keywords.
    """

    peft_class = Linear
    plain = "plain LoRA on nn.Linear"

    @staticmethod
    def covers(base: nn.Module) -> bool:
        return type(base) is nn.Linear

    def base_weight(self, base: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return weight

"""``MaskedLoraLinear``: PEFT's ``lora.Linear`` with ``y = x Wᵀ + bias + γα (x̂ Aᵀ) Bᵀ`` as one op.

Our code is in ``MaskedLoraLayer``, a mixin for PEFT's layer class of each kind of base: here
``nn.Linear``, in ``ila.models.quantized`` the layers of bitsandbytes. They are subclasses, so that
all of PEFT's functions work on them. ``forward`` takes the op where the op covers the case, the
bare linear where no adapter is there, and PEFT's own ``forward`` everywhere else; ``route`` says
which and why.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from ila.models.layer_states import LayerStates, is_sharded
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


def _dropout_of(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


class MaskedLoraLayer(LayerStates):
    """The gate and the route of a LoRA linear layer; mixed in before a layer class of PEFT's.

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

    @staticmethod
    def covers(base: nn.Module) -> bool:
        """Tell whether the op computes a base layer of this kind."""
        raise NotImplementedError

    def base_weight(
        self, base: nn.Module, weight: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor | PackedWeight:
        """W of the base layer, whose parameter is ``weight``, as the op takes it."""
        raise NotImplementedError

    def strip(self) -> None:
        """Open every adapter and leave nothing that PEFT's class lacks."""
        super().strip()
        self.__dict__.pop("_shared_input", None)

    def join(self, shared: Shared | None) -> None:
        """Compute with other layers from now on, or alone again."""
        object.__setattr__(self, "_shared_input", shared)  # nn.Module's takes 1 µs

    def __getstate__(self) -> dict[str, object]:
        """Return the state for copies and pickles, without the state of a running forward."""
        return {**self.__dict__, "_shared_input": None}

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
        if is_sharded(weight) or is_sharded(lora_a):
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
        return None if is_sharded(weight) else Operands(weight, None, None, None, base.bias)

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

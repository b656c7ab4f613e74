"""``MaskedTensor``: a parameter that PEFT adapts as a tensor, with the gate and the closing.

    W + γ ΔW        ΔW of expert e = scaling Bₑ Aₑ

transformers keeps all experts of a block in two tensors (experts, out, in), and PEFT adapts such a
tensor by a ``ParamWrapper`` around its module (``LoraConfig(target_parameters=…)``). PEFT's own
code computes: it makes W + ΔW in each forward. A tensor whose adapter is set aside costs nothing,
since PEFT then makes no sum; a kept one makes the sum and has no gradient.

A module with two adapted tensors has a wrapper in a wrapper, and PEFT's names of saved weights
count the wrappers from outside: ``experts.lora_A`` and ``experts.base_layer.lora_A``. Where the
outer adapter is set aside, the inner one is therefore saved and read without ``base_layer``, as
PEFT names it where the outer one was never there.

A mask names a tensor as PEFT's ``target_parameters`` does, ``mlp.experts.gate_up_proj``; a tensor
called ``weight`` has the name of its module, as a linear layer has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ila.masks.rules import bare
from ila.models.layer import PEFT, MaskedLoraLayer, Route, _Parts

_REASON = "an adapted tensor: PEFT adds its update to W"
L = TypeVar("L", bound=nn.Module)
_INNER = "base_layer."
_SAVED = re.compile(r"(?P<part>(?:base_layer\.)*lora_[AB])\.(?:(?P<adapter>[^.]+)\.)?weight")


class MaskedTensor(MaskedLoraLayer, ParamWrapper):
    """An adapted tensor with a gate, a drop-in for ``peft.tuners.lora.layer.ParamWrapper``."""

    peft_class = ParamWrapper
    plain = "LoRA on a tensor"

    @staticmethod
    def covers(base: nn.Module) -> bool:
        return True

    @property
    def weight(self) -> Tensor:
        """The adapted tensor, without its update."""
        return self.get_param()

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (E, R, K) and B (E, N, R) of E experts; updates are ``scaling[adapter] B A``."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return a.reshape(self.num_experts, -1, a.shape[-1]), self.by_expert(b)

    def by_expert(self, b: Tensor) -> Tensor:
        """Return B (E, N, R), or its gradient, from PEFT's layout (N, R · E)."""
        return b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Return factors of γ ΔW, as PEFT does of ΔW."""
        left, right, scaling = super().get_delta_factors(adapter_name)
        return self._gated(left, adapter_name), right, scaling

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return γ ΔW, as PEFT does ΔW."""
        return self._gated(super().get_delta_weight(adapter_name, *args, **kwargs), adapter_name)

    def _gated(self, update: Tensor, adapter: str) -> Tensor:
        gate = self.gate(adapter)
        # The product is in the wider dtype: the gradient of γ is a sum over all of it.
        return update if gate is None else (update * gate).to(update.dtype)

    def _parts_of(self, adapter: str) -> tuple[Route, _Parts | None]:
        return Route(PEFT, _REASON, adapter), None

    def why_not_scored(self) -> str | None:
        route = self.route()
        return None if route.adapter is not None else route.reason

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the module by PEFT's own code."""
        return super(MaskedLoraLayer, self).forward(x, *args, **kwargs)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return the state; see the module on names inside a wrapper whose adapter is set aside."""
        state = super(MaskedLoraLayer, self).state_dict(*args, prefix=prefix, **kwargs)
        self._move(state, prefix + _INNER, prefix)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._move(state_dict, prefix, prefix + _INNER)
        super(MaskedLoraLayer, self)._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _move(self, state: dict[str, Any], before: str, after: str) -> None:
        """Give another prefix to the weights inside whose adapter is set aside here."""
        ends = {
            name: self._inside(name.removeprefix(before))
            for name in state
            if name.startswith(before)
        }
        # All are taken out first: the new name of one may be the old name of another.
        moved = {after + end: state.pop(name) for name, end in ends.items() if end is not None}
        state.update(moved)

    def _inside(self, name: str) -> str | None:
        """Return a name below this wrapper with its adapter; None if that is not set aside here.

        PEFT reads a saved name without the adapter where it does not find it in the model.
        """
        found = _SAVED.fullmatch(name)
        if found is None or not self._closed:
            return None
        if found["adapter"] is None and len(self._closed) > 1:
            raise RuntimeError(
                f"{name} may be of adapter {' or '.join(map(repr, self._closed))}, which are all "
                "closed here; open the others before loading one"
            )
        adapter = found["adapter"] or next(iter(self._closed))
        return f"{found['part']}.{adapter}.weight" if self.is_closed(adapter) else None


# PEFT finds the wrapper of a tensor for a second adapter by the name of its class.
MaskedTensor.__name__ = ParamWrapper.__name__


def named_layers(model: nn.Module, kind: type[L]) -> dict[str, L]:
    """Return layer name -> layer, for every module of a kind.

    The tensors of one module come in its own order, which is that of the wrappers from inside out.
    """
    found: dict[str, L] = {}
    for name, module in model.named_modules():
        nest = [module]
        while isinstance(nest[-1], ParamWrapper):
            nest.append(nest[-1].base_layer)
        for layer in reversed(nest):
            if isinstance(layer, kind):
                found.setdefault(layer_name(name, layer), layer)
    return found


def layer_name(name: str, module: nn.Module) -> str:
    """Return the name that a mask has for a layer, from the name and the object of its module."""
    if not isinstance(module, ParamWrapper):
        return name
    tensor = parameter_name(name, module)
    return tensor.removesuffix(".weight")


def record_of_tensors(layers: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Return the part of a mask's provenance on adapted tensors; empty where there are no tensors.

    It has layer name -> name for PEFT's ``target_parameters``.
    """
    names = {
        name: bare(parameter_name(name.removesuffix(f".{layer.parameter_name}"), layer))
        for name, layer in layers.items()
        if isinstance(layer, ParamWrapper)
    }
    return {"target_parameters": names} if names else {}


def parameter_name(name: str, module: ParamWrapper) -> str:
    """Return the name of an adapted tensor, as it was before PEFT wrapped its module."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{module.parameter_name}"

"""``MaskedLoraLinear`` over the 4-bit and int8 layers of bitsandbytes: QLoRA.

The base stays bitsandbytes' own module, and PEFT's class for it is the other parent: PEFT merges,
saves and computes everything on its own path. Import this module only if bitsandbytes is installed.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import bnb as peft_bnb
from torch import nn

from ila.models.layer import MaskedLoraLayer
from ila_kernels.quant import Packed4bit, Packed8bit


class MaskedLoraLinear4bit(MaskedLoraLayer, peft_bnb.Linear4bit):
    """A gated LoRA layer over ``bitsandbytes.nn.Linear4bit``, a drop-in for PEFT's."""

    peft_class = peft_bnb.Linear4bit
    plain = "plain LoRA on bitsandbytes' Linear4bit"

    @staticmethod
    def covers(base: nn.Module) -> bool:
        """Tell whether a base layer is one of bitsandbytes' 4-bit layers."""
        return isinstance(base, Linear4bit)

    def base_weight(self, base: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> Packed4bit:
        """Return the packed weight with its scales and its dtype of computing."""
        state = getattr(weight, "quant_state", None) or base.quant_state
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        return Packed4bit(weight, state, base.compute_dtype)

    def prepare(self) -> None:
        """Prepare the layer, and keep its weight in the layout of training."""
        super().prepare()
        _keep_layout(self.get_base_layer())


class MaskedLoraLinear8bit(MaskedLoraLayer, peft_bnb.Linear8bitLt):
    """A gated LoRA layer over a frozen ``bitsandbytes.nn.Linear8bitLt``, a drop-in for PEFT's."""

    peft_class = peft_bnb.Linear8bitLt
    plain = "plain LoRA on bitsandbytes' Linear8bitLt"

    @staticmethod
    def covers(base: nn.Module) -> bool:
        """Tell whether a base layer is a frozen int8 layer of bitsandbytes."""
        # With has_fp16_weights the weight is dense and trained, quantised anew at every step.
        return isinstance(base, Linear8bitLt) and not base.state.has_fp16_weights

    def base_weight(self, base: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> Packed8bit:
        """Return the packed weight with its scales."""
        base.state.is_training = base.training
        if base.weight.CB is not None:
            base.init_8bit_state()
        return Packed8bit(base.state)


CLASSES = (MaskedLoraLinear4bit, MaskedLoraLinear8bit)


def keep_training_layout(model: nn.Module, keep: bool = True) -> None:
    """Stop bitsandbytes from rewriting 4-bit weights for inference; with ``keep=False`` allow it.

    At the first evaluation without gradients on a CPU with AVX512-BF16, bitsandbytes rewrites a
    weight into a layout for inference and rounds its scales to bf16. Training reads that layout
    wrongly: it loses the gradient of x, and so of every layer below, without an error.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            if keep:
                _keep_layout(module)
            elif module.__dict__.pop(_REPACKS, False):
                module.support_avx512bf16_for_cpu = True


_REPACKS = "_ila_repacks"


def _keep_layout(base: nn.Module) -> None:
    if not getattr(base, "support_avx512bf16_for_cpu", False):
        return
    state = getattr(base.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base.state_dict()  # bitsandbytes' way back to the layout of training
        if state.absmax.dim() == 2:  # which forgets the scales where they are not nested
            state.absmax = state.absmax.t().reshape(-1).float()
    base.support_avx512bf16_for_cpu = False
    base.__dict__[_REPACKS] = True

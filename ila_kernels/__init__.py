"""Masked LoRA linear layers: ``y = x Wᵀ + bias + γα (x̂ Aᵀ) Bᵀ`` and its gradients.

Tensors in, tensors out; this package knows no models. Importing it starts nothing, reads no
environment variable and needs neither a GPU nor Triton.
"""

from ila_kernels._version import __version__
from ila_kernels.choice import prefer, verdicts_in_use
from ila_kernels.functional import group_pays, masked_lora_linear, masked_lora_linear_group
from ila_kernels.swiglu import swiglu_product
from ila_kernels.tuning import Tuned, tune, use_verdicts

__all__ = [
    "Tuned",
    "__version__",
    "group_pays",
    "masked_lora_linear",
    "masked_lora_linear_group",
    "prefer",
    "swiglu_product",
    "tune",
    "use_verdicts",
    "verdicts_in_use",
]

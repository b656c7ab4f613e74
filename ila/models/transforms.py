"""Tell whether ``torch.func`` transforms the running code: grad, vjp, vmap, jvp.

A transform needs a rule for every operator. PyTorch's operators have one; the backward that
``ila_kernels`` derives by hand has none. So PEFT's and transformers' own code runs under a
transform.
"""

import torch


def under_transform() -> bool:
    """Return whether a transform runs; 0.1 µs, for every forward asks."""
    return torch._C._are_functorch_transforms_active()

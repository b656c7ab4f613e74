"""A device proves itself before it is trusted: a tiny problem against ``eager`` in fp64, once.

On a GPU or driver that Triton does not really support, kernels have been seen to write nothing
and raise nothing (unslothai/unsloth#11614). Training on that is worse than an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ila_kernels import eager
from ila_kernels.choice import preference
from ila_kernels.eager import Needs
from ila_kernels.kernels import linear

_passed: set[tuple[torch.device, str | None]] = set()

SMALL = (37, 48, 40, 4)
# Rows that a tensor descriptor takes, and more of them than the smallest tile has: what `form`
# sends to the persistent form of the GEMM where that is chosen.
ALIGNED = (150, 136, 264, 4)
SCALE = 0.5


def ensure(device: torch.device) -> None:
    """Check a device the first time it is met; waits for it then, and never again.

    Another form of the GEMM (``prefer``) is other code, so it is checked anew.

    Raises:
        RuntimeError: If a result of the kernels is not that of ``eager`` in fp64.
    """
    checked = device, preference().gemm
    if checked in _passed:
        return
    check(device)
    _passed.add(checked)


def _inputs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    m, k, n, r = shape
    shapes = ((m, k), (n, k), (r, k), (n, r), (1,), (m, n))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


@torch.no_grad()
def check(device: torch.device) -> None:
    """Compare y and every gradient of small fp32 and fp16 problems with ``eager`` in fp64."""
    # Not bfloat16: the oldest GPUs that Triton supports do not have it.
    problems = ((SMALL, torch.float32), (SMALL, torch.float16), (ALIGNED, torch.float16))
    for shape, dtype in problems:
        x, w, a, b, gate, dy = _inputs(shape, device, dtype)
        y, t = linear.forward(x, w, a, b, gate, None, None, SCALE, 0.0)
        needs = Needs(x=True, weight=False, lora_a=True, lora_b=True, gate=True, bias=False)
        grads = linear.backward(dy, x, w, a, b, gate, t, None, SCALE, 0.0, needs)
        x, w, a, b, gate, dy = (v.cpu().double() for v in (x, w, a, b, gate, dy))
        # Not by autograd: inside an op, where a compiled graph gets here, it records nothing.
        expected, t = eager.forward(x, w, a, b, gate, None, None, SCALE, 0.0)
        wanted = eager.backward(dy, x, w, a, b, gate, t, None, SCALE, 0.0, needs)
        names = ("y", "dx", "dA", "dB", "dγ")
        got = (y, grads.x, grads.lora_a, grads.lora_b, grads.gate)
        exact = (expected, wanted.x, wanted.lora_a, wanted.lora_b, wanted.gate)
        for name, ours, right in zip(names, got, exact, strict=True):
            # Coarse: it tells work from no work, and the tests tell right from nearly right.
            error = (ours.cpu().double() - right).abs().max() / right.abs().max()
            if not error < 16 * torch.finfo(torch.float16).eps:
                raise RuntimeError(
                    f"the Triton kernels compute wrong results on {device}: {name} of a {shape} "
                    f"{dtype} problem is off by {error:.2g} of its size; use impl='eager' there "
                    "and report the GPU, its driver and the version of Triton"
                )

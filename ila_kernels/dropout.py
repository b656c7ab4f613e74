"""Dropout masks as a function of a seed, so that backward redraws the mask of forward.

``keep = Bernoulli(1 − p)`` of shape (M, K) is a pure function of (seed, M, K, p, device): only the
seed, eight bytes, lives from forward to backward, where a stored mask would cost M·K bytes.
"""

from __future__ import annotations

import torch

from ila_kernels.device import is_capturing

_SEED_RANGE = 2**62


def draw_seed(count: int = 1) -> torch.Tensor:
    """Draw seeds from torch's default CPU generator.

    Activation checkpointing restores the generator's state, so a recomputed forward draws the
    same seeds. The tensor stays on the CPU: reading it never waits for a GPU.

    Returns:
        int64 tensor of shape (count,) on the CPU.
    """
    return torch.randint(_SEED_RANGE, (count,), dtype=torch.int64, device="cpu")


@torch.library.custom_op("ila::keep_mask", mutates_args=())
def keep_mask(
    seed: torch.Tensor, m: int, k: int, dropout_p: float, device: torch.device
) -> torch.Tensor:
    """Draw the dropout mask that belongs to ``seed``.

    Args:
        seed: int64 tensor with one element, on the CPU.
        m: Rows M (tokens).
        k: Columns K (in-features).
        dropout_p: Probability of dropping an element, in [0, 1).
        device: Where the mask is drawn; different device types give different masks.

    Returns:
        bool tensor (M, K) on ``device``, True with probability 1 − p.

    Raises:
        RuntimeError: While a CUDA graph is captured: every replay would draw the same mask.
    """
    if device.type == "meta":
        return torch.empty(m, k, dtype=torch.bool, device=device)
    if device.type == "cuda" and is_capturing():
        raise RuntimeError(
            "dropout_p must be 0 while a CUDA graph is captured: every replay would draw the same "
            "mask; capture without dropout, or train without the graph"
        )
    generator = torch.Generator(device=device)
    generator.manual_seed(int(seed))
    # Drawn as bool: comparing torch.rand with p would write and read an fp32 (M, K) on the way.
    keep = torch.empty(m, k, dtype=torch.bool, device=device)
    return keep.bernoulli_(1.0 - dropout_p, generator=generator)


@keep_mask.register_fake
def _(seed, m, k, dropout_p, device):
    return torch.empty(m, k, dtype=torch.bool, device=device)

"""The specification: ``y = x Wᵀ + bias + γα (x̂ Aᵀ) Bᵀ`` with ``x̂ = x ⊙ keep / (1 − p)``.

Plain torch in the dtype of ``x``, differentiated by autograd, right in fp64. Every other
implementation is measured against this file; nothing here is tuned for speed.
"""

from __future__ import annotations

import torch


def masked_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    gate: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Compute the masked LoRA linear by its definition.

    Args:
        x: Input, shape (..., K), any floating dtype; the result is computed in this dtype.
        weight: Base weight W, shape (N, K).
        lora_a: A, shape (R, K).
        lora_b: B, shape (N, R).
        gate: γ, one element; ``None`` means 1.
        bias: Base bias, shape (N,), or ``None``.
        scale: α, the LoRA scaling.
        keep: Dropout mask of the shape of ``x``, nonzero where x is kept; ``None`` keeps all.
        dropout_p: p of the dropout that made ``keep``.

    Returns:
        y, shape (..., N), dtype of ``x``.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> masked_lora_linear(one, one, one, one, gate=torch.tensor(0.5), scale=4.0).item()
    3.0
    """
    dtype = x.dtype
    x_hat = x if keep is None else x * keep.to(dtype) / (1.0 - dropout_p)
    t = x_hat @ lora_a.to(dtype).transpose(0, 1)
    low_rank = scale * (t @ lora_b.to(dtype).transpose(0, 1))
    if gate is not None:
        low_rank = gate.to(dtype) * low_rank
    y = x @ weight.to(dtype).transpose(0, 1) + low_rank
    return y if bias is None else y + bias.to(dtype)

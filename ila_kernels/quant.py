"""Base weights that exist only packed: ``y = x Wᵀ + bias``, where W is unpacked for each use.

A packed weight takes the place of W in ``masked_lora_linear``. Forward is the quantisation
library's own matmul, and dx = dy W follows its rule too: backward unpacks W once more. Between the
two only the packed bytes live, which belong to the model; a dense W kept for backward would cost
2·N·K bytes a layer in bf16, where NF4 stores N·K/2.

The first call that needs bitsandbytes imports it; no other file of this package does.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PackedWeight(abc.ABC):
    """A frozen W (N, K) in the layout of a quantisation library.

    Attributes:
        shape: (N, K).
        device: Where the packed bytes are.
        compute_dtype: Dtype that products with W run in; ``None`` means that of x or dy.
    """

    shape: tuple[int, int]
    device: torch.device
    compute_dtype: torch.dtype | None = None

    @abc.abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (M, K) -> x Wᵀ + bias (M, N) in the dtype of x; not differentiable here."""

    @abc.abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Unpack W (N, K) in ``dtype``: a new tensor each time."""

    def input_grad(self, dy: Tensor) -> Tensor:
        """dy (M, N) -> dy W (M, K) in the dtype of dy."""
        dtype = self.compute_dtype or dy.dtype
        return torch.mm(dy.to(dtype), self.dense(dtype)).to(dy.dtype)


class Packed4bit(PackedWeight):
    """NF4 or FP4 blocks of bitsandbytes, with or without double quantisation.

    Args:
        data: Packed bytes, in the layout of ``bitsandbytes.functional.quantize_4bit``.
        state: Its ``QuantState``: scales of the blocks, code, shape (N, K).
        compute_dtype: Dtype of the products; ``None`` means that of x or dy.
    """

    def __init__(self, data: Tensor, state: Any, compute_dtype: torch.dtype | None = None):
        self.data, self.state, self.compute_dtype = data, state, compute_dtype
        self.shape, self.device = tuple(state.shape), data.device

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from bitsandbytes import matmul_4bit

        dtype = self.compute_dtype or x.dtype
        bias = None if bias is None else bias.to(dtype)
        if dtype == torch.float64:
            # bitsandbytes has no fp64: its CPU kernel would return memory it never wrote.
            return F.linear(x, self.dense(dtype), bias)
        with torch.no_grad():
            y = matmul_4bit(x.to(dtype), self.data, quant_state=self.state, bias=bias)
        return y.to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # Through the dtype that W had before it was packed, as in bitsandbytes' own backward.
        return dequantize_4bit(self.data, self.state).to(dtype)


class Packed8bit(PackedWeight):
    """Rows of int8 with one scale each, the frozen weights of bitsandbytes' LLM.int8().

    On a GPU x is quantised as well and its outlier columns are not; dx is exact in W's int8
    values. That is bitsandbytes' rule, kept here.

    Args:
        state: A ``bitsandbytes.MatmulLtState`` that holds CB (N, K) int8 and SCB (N,) fp32.
    """

    def __init__(self, state: Any):
        self.state, self.data, self.scales = state, state.CB, state.SCB
        self.shape, self.device = tuple(self.data.shape), self.data.device

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from bitsandbytes import matmul

        bias = None if bias is None else bias.to(x.dtype)
        with torch.no_grad():
            return matmul(x, self.data, bias=bias, state=self.state)

    def dense(self, dtype: torch.dtype) -> Tensor:
        scales = self.scales.unsqueeze(1).mul(1.0 / 127.0)
        return self.data.to(dtype, copy=True).mul_(scales)


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    """x (M, K) -> x Wᵀ + bias (M, N), for a weight of either kind."""
    if isinstance(weight, PackedWeight):
        return weight.linear(x, bias)
    return F.linear(x, weight, bias)


def input_grad(dy: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """dy (M, N) -> dy W (M, K), for a weight of either kind."""
    if isinstance(weight, PackedWeight):
        return weight.input_grad(dy)
    return torch.mm(dy, weight)

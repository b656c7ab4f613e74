"""The sum of cross-entropies of a linear head, chunk by chunk, with the gradient of its input.

    z = f(h Wᵀ + b)      loss = Σ_i logsumexp(z_i) − z_{i, t_i}
    dh = ((softmax(z) − onehot(t)) ⊙ df/dz) W

W is frozen, so dh is all that backward needs, and it is known as soon as a chunk's logits are: it
is computed beside them. Nothing of size (tokens × vocabulary) is ever there: forward needs one
chunk of logits at a time and keeps dh, as large as h. A target ``IGNORED`` leaves its row out.

A chunk has as many rows as a GEMM wants, in the dtype of h. Softmax runs in fp32 over blocks of it,
each small enough to stay in a cache, and writes softmax(z) − onehot(t) over the block's logits.

f is the identity, or scales and caps logits as some families do (``LogitMap``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from ila.data.contracts import IGNORED

CHUNK_BYTES = 2**28  # of fp32 logits: 512 rows of Llama 3, enough to keep a GPU's GEMM busy
# Of fp32 logits too. On a CPU the loss of 500 rows of SmolLM2 took 178 ms by blocks, and 282 ms in
# one piece, whose memory is new each time; a GPU takes longer over 16 MiB than over a launch.
BLOCK_BYTES = 2**24


class LogitMap(NamedTuple):
    """f(z) = cap · tanh(scale · z / cap), or scale · z without a cap.

    >>> LogitMap().is_identity, LogitMap(cap=30.0).is_identity
    (True, False)
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Tell whether the logits are the output of the head, unchanged."""
        return self.scale == 1.0 and self.cap is None


IDENTITY = LogitMap()


def chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Count the rows of a chunk: its logits take at most ``CHUNK_BYTES``, or it is one row.

    >>> chunk_rows(128_256, torch.bfloat16), chunk_rows(32_000, torch.float64)
    (512, 1024)
    """
    return _rows_within(CHUNK_BYTES, vocabulary, dtype)


def _rows_within(most: int, vocabulary: int, dtype: torch.dtype) -> int:
    rows = max(1, most // (vocabulary * wide(dtype).itemsize))
    return 1 << (rows.bit_length() - 1)


def sum_and_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_map: LogitMap = IDENTITY,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of all rows, and dh.

    Args:
        hidden: h (M, K), of any float dtype.
        weight: W (V, K), of that dtype.
        bias: b (V,), of that dtype, or None.
        targets: t (M,), int64, ``IGNORED`` where a row does not count.
        logit_map: f.
        with_gradient: False leaves dh out.

    Returns:
        The sum, a scalar in fp32 (fp64 for fp64), and dh (M, K) in the dtype of h, zero in rows
        that do not count; (0, 0) without gradient.
    """
    total = hidden.new_zeros((), dtype=wide(hidden.dtype))
    gradient = torch.zeros_like(hidden) if with_gradient else hidden.new_zeros(0, 0)
    counted = counted_rows(hidden, targets)
    rows = chunk_rows(weight.shape[0], hidden.dtype)
    for start in range(0, len(counted), rows):
        at = counted[start : start + rows]
        part, dh = _chunk(hidden[at], weight, bias, targets[at], logit_map, with_gradient)
        total += part
        if with_gradient:
            gradient[at] = dh
    return total, gradient


def counted_rows(hidden: Tensor, targets: Tensor) -> Tensor:
    """List the rows that count; all of them where values are not known (fake tensors)."""
    if isinstance(hidden, FakeTensor) or hidden.is_meta:
        return torch.arange(len(targets), device=targets.device)
    return (targets != IGNORED).nonzero().squeeze(1)


def _chunk(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_map: LogitMap,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(h, weight, bias)
    total = h.new_zeros((), dtype=wide(h.dtype))
    rows = _rows_within(BLOCK_BYTES, weight.shape[0], h.dtype)
    for start in range(0, len(h), rows):
        at = slice(start, start + rows)
        total += _block(logits[at], targets[at, None], logit_map, with_gradient)
    return total, logits @ weight if with_gradient else None


def _block(logits: Tensor, at: Tensor, logit_map: LogitMap, with_gradient: bool) -> Tensor:
    """Return the loss of the rows; put the gradient of their logits in the place of these."""
    z, slope = logits.to(wide(logits.dtype)), None
    if logit_map.scale != 1.0:
        z.mul_(logit_map.scale)
    if logit_map.cap is not None:
        z.div_(logit_map.cap).tanh_()
        slope = 1.0 - z * z if with_gradient else None
        z.mul_(logit_map.cap)
    z.sub_(z.amax(1, keepdim=True))
    chosen = z.gather(1, at)
    total = z.exp_().sum(1, keepdim=True)
    loss = (total.log() - chosen).sum()
    if not with_gradient:
        return loss
    z.div_(total).scatter_add_(1, at, z.new_full((1, 1), -1.0).expand_as(at))
    if slope is not None:
        z.mul_(slope)
    if logit_map.scale != 1.0:
        z.mul_(logit_map.scale)
    if z is not logits:
        logits.copy_(z)
    return loss


def wide(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype in which a loss of logits in ``dtype`` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32

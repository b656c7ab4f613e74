"""Fused losses of other projects: linear head and cross-entropy as one, for a frozen head.

The rivals get what a user who knows them would give them: the tokens whose next one is a label, and
nothing else; of torch's settings, those that are fastest here and right in 16 bits. With its own
choice of chunks (``"auto"``) torch's takes ten times as long over a frozen head on a CPU, and its
loss in bf16 is 3 % off, because chunks are added up in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ila.data.contracts import IGNORED

TORCH_LOSS = "PEFT, torch's fused loss"
LIGER_LOSS = "PEFT, Liger's fused loss"
CHUNK_ROWS = 1024
# h (M, K), W (V, K), t (M,) -> the mean of the cross-entropies.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Call torch's ``linear_cross_entropy`` in chunks of ``CHUNK_ROWS``."""
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=CHUNK_ROWS, chunking_method=None, acc_policy="accurate"
    )
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def by_liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Call Liger's kernel; written from its public source, and never run by us."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


LOSSES: dict[str, Loss] = {TORCH_LOSS: by_torch, LIGER_LOSS: by_liger}


def why_not(name: str) -> str | None:
    """Say why a fused loss cannot run here; None if it can."""
    if name == TORCH_LOSS:
        known = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")
        return None if known else f"torch {torch.__version__} has no linear_cross_entropy"
    if not torch.cuda.is_available():
        return "its kernels need a GPU"
    return None if find_spec("liger_kernel") is not None else "liger_kernel is not installed"


def fuse(model: nn.Module, loss: Loss) -> None:
    """Let a PEFT model of a dense family compute its loss by ``loss``, at answers alone."""
    causal = model.get_base_model()

    def forward(input_ids: Tensor, labels: Tensor, **inputs: Tensor) -> SimpleNamespace:
        known = {name: inputs[name] for name in ("attention_mask",) if name in inputs}
        hidden = causal.model(input_ids=input_ids, **known).last_hidden_state
        targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
        at = (targets != IGNORED).nonzero().squeeze(1)
        rows = hidden.flatten(0, 1).index_select(0, at)
        return SimpleNamespace(loss=loss(rows, causal.lm_head.weight, targets[at]))

    causal.forward = forward

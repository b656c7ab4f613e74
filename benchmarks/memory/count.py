"""Count the bytes of a training step: what stands, what is kept for backward, the most alive.

Fake tensors run the whole step, autograd and checkpoints included, and ``live_bytes`` counts.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benchmarks.memory.live_bytes import TOKENS, Bytes, LiveBytes, bytes_of
from benchmarks.memory.rows import fake
from ila.models.lean_head import head_route


def count(
    model: nn.Module, checkpointing: bool = False, tokens: int = TOKENS, by_token: bool = True
) -> dict[str, Any]:
    """Count a step of a model on the meta device; see ``count_step``."""
    if checkpointing:
        checkpoint_blocks(model)
    with FakeTensorMode():
        stored = fake(model)
        return count_step(model, stored, torch.zeros(1, tokens, dtype=torch.long), by_token)


def count_step(
    model: nn.Module, stored: list[Tensor], ids: Tensor, by_token: bool = True
) -> dict[str, Any]:
    """Count the second step of training on one batch: the optimiser has its states by then.

    Args:
        model: In training mode; fake or real.
        stored: All tensors that the model consists of.
        ids: (rows, tokens).
        by_token: Whether counts are functions of the number of tokens, see ``live_bytes``.

    Returns:
        Bytes of "weights" (all that is frozen, buffers included), "adapters", "optimizer" and
        "gradients"; ``[constant, per_token]`` of "kept", which is what is there after forward
        beyond those and the batch; and "peaks", the largest of that in forward and backward.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    states = first_step(trained)
    live = LiveBytes(ids.shape[1] if by_token else None)
    live.add([*stored, *states, ids])
    start = live.now
    live.begin_anew()
    with live:
        loss = model(**batch_of(model, ids)).loss
        gc.collect()  # outputs that refer to each other would count as kept
        kept = live.now.minus(start)
        loss.backward()
    own = {t.untyped_storage()._cdata for t in trained}
    frozen = [t for t in stored if t.untyped_storage()._cdata not in own]
    return {
        "weights": bytes_of(frozen),
        "adapters": bytes_of(trained),
        "optimizer": bytes_of(states),
        "gradients": bytes_of(p.grad for p in trained if p.grad is not None),
        "kept": kept,
        "peaks": envelope([peak.minus(start) for peak in live.peaks]),
    }


def batch_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Tokens that are all labels; for a lean head the last one too, which computes what counts."""
    shifted = {} if head_route(model) is None else {"shift_labels": ids}
    return {"input_ids": ids, "labels": ids, **shifted}


def envelope(lines: list[Bytes]) -> list[Bytes]:
    """Return the lines that are the largest at some number of tokens ≥ 1, by their slope."""
    upper: list[Bytes] = []
    for line in sorted(lines, key=lambda line: (line.per_token, line.constant)):
        while upper and upper[-1].at(1) <= line.at(1):
            upper.pop()
        # The last is above its neighbours nowhere if they cross before it crosses the one below.
        while len(upper) > 1 and _crossing(upper[-2], line) <= _crossing(upper[-2], upper[-1]):
            upper.pop()
        upper.append(line)
    return upper


def _crossing(flat: Bytes, steep: Bytes) -> float:
    """The number of tokens from which ``steep`` is the larger."""
    return (flat.constant - steep.constant) / (steep.per_token - flat.per_token)


def first_step(trained: list[nn.Parameter]) -> list[Tensor]:
    """Let AdamW make its states; return them. The gradients are gone afterwards."""
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return [t for state in optimizer.state.values() for t in state.values()]


def checkpoint_blocks(model: nn.Module) -> None:
    """Turn gradient checkpointing on the way ``transformers.Trainer`` does."""
    model.activation_checkpointing_enable()

"""Rows that a loss depends on: an MLP leaves out padding, and the last one all but the answers.

An MLP computes every position by itself. Its result at a position reaches the loss through the keys
and values of later blocks, which attention masks where the position is padding, and through the
head, which reads the positions that have a label. So, while only the loss of a batch is wanted
(``lean_forward``), an MLP may compute some rows and add nothing to the others:

    out[rows] = mlp(x[rows])    out = 0 elsewhere

The loss and every gradient stay the same: no gradient comes back to a row that is left out.

A checkpoint runs a block again outside of that forward; it finds the rows in its record
(``ila.models.recomputation``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ila.data.contracts import IGNORED
from ila.models.recomputation import remembered

# A margin for picking rows and putting them back. Forward and backward of SmolLM2-135M's MLP, bf16,
# 4 x 256 tokens: 0.89 of the time of all rows at 0.93 of the rows, 0.77 at 0.8 (CPU time of one
# thread of an AMD EPYC, medians of 41 interleaved rounds).
MOST = 0.93


@dataclass(frozen=True)
class NeededRows:
    """The rows that the MLPs of one forward have to compute.

    Attributes:
        count: B·T, rows of the batch.
        tokens: Numbers of the rows that are no padding, (n,); None for all rows.
        answers: Numbers of the rows whose next token is a label, (n,); None for ``tokens``.
        last: MLP of the last block, the only one that computes ``answers``.
    """

    count: int
    tokens: Tensor | None
    answers: Tensor | None = None
    last: nn.Module | None = None

    @classmethod
    def of(
        cls, attention_mask: Tensor | None, targets: Tensor, last: nn.Module | None
    ) -> NeededRows:
        """Read the rows off a batch.

        Args:
            attention_mask: (B, T), 0 at padding; another shape, or None, tells nothing.
            targets: (B·T,), the next token at answers, ``IGNORED`` elsewhere.
            last: MLP of the last block; None where other code reads its result.
        """
        labelled, tokens = targets != IGNORED, None
        if attention_mask is not None and attention_mask.dim() == 2:
            real = (attention_mask != 0).reshape(-1)
            if real.shape == labelled.shape:
                tokens = _numbers(real.to(labelled.device) | labelled)
        answers = None if last is None else _numbers(labelled)
        return cls(targets.numel(), tokens, answers, last)

    def of_mlp(self, mlp: nn.Module, x: Tensor) -> Tensor | None:
        """Return the numbers of the rows of x (..., K) that an MLP computes; None for all."""
        if x.shape[:-1].numel() != self.count:
            return None
        rows = self.answers if mlp is self.last and self.answers is not None else self.tokens
        return rows if rows is None else rows.to(x.device)


def _numbers(rows: Tensor) -> Tensor | None:
    """Return where rows (B·T,) is true; None where leaving out the others would not pay."""
    found = rows.nonzero().squeeze(1)
    return found if 0 < found.numel() <= MOST * rows.numel() else None


class _Current(threading.local):
    needed: NeededRows | None = None


_current = _Current()


@contextmanager
def needing(needed: NeededRows | None) -> Iterator[None]:
    """Let the MLPs of this thread compute these rows until the ``with`` ends; None for all."""
    outer, _current.needed = _current.needed, needed
    try:
        yield
    finally:
        _current.needed = outer


def needed_rows(mlp: nn.Module, x: Tensor) -> Tensor | None:
    """Return the numbers of the rows of x (..., K) that an MLP has to compute; None for all."""
    if torch.compiler.is_compiling():
        return None
    return remembered((mlp, "rows"), lambda: _asked(mlp, x))


def _asked(mlp: nn.Module, x: Tensor) -> Tensor | None:
    return None if _current.needed is None else _current.needed.of_mlp(mlp, x)


def on_rows(x: Tensor, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute y of some rows of x, and 0 elsewhere.

    Args:
        x: (..., K).
        rows: Their numbers, (n,), each once.
        compute: (n, K) -> (n, N), a row at a time.

    Returns:
        (..., N).
    """
    y = compute(x.reshape(-1, x.shape[-1]).index_select(0, rows))
    out = y.new_zeros(x.shape[:-1].numel(), y.shape[-1]).index_copy(0, rows, y)
    return out.view(*x.shape[:-1], y.shape[-1])

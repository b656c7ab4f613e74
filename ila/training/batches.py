"""Put rows of like length into one batch, and measure the padding.

A batch is as wide as its longest row. Trainer draws rows at random; asked to, it sorts up to fifty
batches of them by length at a time, which leaves the order of batches random.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

# Older versions of transformers have the second name, newer ones the first.
_OPTIONS = {"train_sampling_strategy": "group_by_length", "group_by_length": True}


def by_length() -> dict[str, str | bool]:
    """Return ``training_args`` that make Trainer put rows of like length into one batch."""
    known = TrainingArguments.__dataclass_fields__
    return next({name: value} for name, value in _OPTIONS.items() if name in known)


def is_by_length(training_args: Mapping[str, object]) -> bool:
    """Tell whether ``training_args`` group rows by length."""
    return any(training_args.get(name) == value for name, value in _OPTIONS.items())


def padding_share(lengths: Sequence[int], batch_size: int, grouped: bool = False) -> float:
    """Return the share of padding in the batches of an epoch, for one order of the rows.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        grouped: Whether a batch holds rows of like length.

    >>> padding_share([4, 4, 4, 4], 2), padding_share([2, 4], 2), padding_share([2, 4], 1)
    (0.0, 0.25, 0.0)
    """
    order = list(range(len(lengths)))
    if grouped:
        generator = torch.Generator().manual_seed(0)
        order = get_length_grouped_indices(list(lengths), batch_size, generator=generator)
    else:
        random.Random(0).shuffle(order)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1.0 - sum(lengths) / positions


def padding_note(
    rows: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int,
    training_args: Mapping[str, object],
    packing: bool = False,
) -> str:
    """Write the share of padding, at random and with rows of like length."""
    if packing:
        return "Padding: none, the rows of a batch are packed into one."
    lengths = [len(row["input_ids"]) for row in rows]
    share = padding_share(lengths, batch_size)
    like = padding_share(lengths, batch_size, grouped=True)
    if is_by_length(training_args):
        return f"Padding: {like:.0%} of the positions of a batch; {share:.0%} if drawn at random."
    return f"Padding: {share:.0%} of the positions of a batch; {like:.0%} with --group-by-length."

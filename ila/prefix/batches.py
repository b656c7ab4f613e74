"""Number the rows of a data set, and make batches of cached states in place of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ila.data.contracts import IGNORED, Collate, Dataset, Row
from ila.prefix.state_file import States, checksum_of_tokens

_ROW = "ila_prefix_row"
_KEYS = {"input_ids", "attention_mask", "labels"}


@dataclass(frozen=True)
class NumberedRows:
    """A data set that adds its number to each row."""

    rows: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return {**self.rows[index], _ROW: int(index)}


@dataclass(frozen=True)
class CachedCollator:
    """Make batches of states in place of tokens; ``inner`` makes all other entries."""

    inner: Collate
    states: States

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch.

        Raises:
            ValueError: If the collator changes tokens or adds entries, or a row has changed since
                its states were computed.
        """
        if any(_ROW not in row for row in rows):
            raise ValueError(
                "rows must come from the cache's dataset with their numbers; with a Trainer of "
                "your own, set remove_unused_columns=False"
            )
        numbers = [row[_ROW] for row in rows]
        plain = [{name: value for name, value in row.items() if name != _ROW} for row in rows]
        for number, row in zip(numbers, plain, strict=True):
            self._check_same(number, torch.as_tensor(row["input_ids"]))
        batch = whole_batch(self.inner, plain, numbers)
        ids = batch.pop("input_ids")
        states = torch.zeros(*ids.shape, self.states.width, dtype=self.states.dtype)
        for at, row in enumerate(plain):
            states[at, : len(row["input_ids"])] = self.states[numbers[at]]
        return {**batch, "inputs_embeds": states}

    def _check_same(self, number: int, tokens: Tensor) -> None:
        if checksum_of_tokens(tokens) != self.states.tokens_crc[number]:
            raise ValueError(
                f"row {number} of the dataset has changed since its states were computed; data "
                "that changes from epoch to epoch cannot be cached"
            )


def whole_batch(collate: Collate, rows: Sequence[Row], numbers: Sequence[int]) -> dict[str, Tensor]:
    """Make a batch in which each row stands whole at the left, and nothing else but padding.

    Args:
        collate: Makes the batch.
        rows: Rows without their numbers.
        numbers: Their places in the data set, for the errors.

    Raises:
        ValueError: If the batch has an entry beside tokens, mask and labels, or a row in it is not
            as it was.
    """
    batch = dict(collate(list(rows)))
    unknown = sorted(set(batch) - _KEYS)
    if unknown:
        raise ValueError(
            f"the prefix cache does not know what {unknown} of the collator mean: states are "
            "computed from input_ids alone; remove such columns, or train without the cache"
        )
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    if "labels" in batch and (batch["labels"][~mask] != IGNORED).any():
        raise ValueError("labels must be -100 on padding to train on cached states")
    for at, row in enumerate(rows):
        tokens = torch.as_tensor(row["input_ids"])
        count = len(tokens)
        is_whole = int(mask[at].sum()) == count and bool(mask[at, :count].all())
        if not is_whole or not torch.equal(ids[at, :count].cpu(), tokens):
            raise ValueError(
                "the collator must keep each row's tokens and pad on the right to use cached "
                f"states; it changed row {numbers[at]}, or attention_mask holds 0 in that row"
            )
    return batch

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
        plain = [{name: value for name, value in row.items() if name != _ROW} for row in rows]
        batch = dict(self.inner(plain))
        unknown = sorted(set(batch) - _KEYS)
        if unknown:
            raise ValueError(
                f"the prefix cache does not know what {unknown} of the collator mean: states are "
                "computed from input_ids alone; remove such columns, or train without the cache"
            )
        ids = batch.pop("input_ids")
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        if "labels" in batch and (batch["labels"][~mask] != IGNORED).any():
            raise ValueError("labels must be -100 on padding to train on cached states")
        states = torch.zeros(*ids.shape, self.states.width, dtype=self.states.dtype)
        for at, row in enumerate(rows):
            tokens = torch.as_tensor(row["input_ids"])
            self._check_row(row[_ROW], tokens, ids[at], mask[at])
            states[at, : len(tokens)] = self.states[row[_ROW]]
        return {**batch, "inputs_embeds": states}

    def _check_row(self, number: int, tokens: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Raise unless a row is as it was cached and stands whole at the left of its batch row."""
        count = len(tokens)
        if checksum_of_tokens(tokens) != self.states.tokens_crc[number]:
            raise ValueError(
                f"row {number} of the dataset has changed since its states were computed; data "
                "that changes from epoch to epoch cannot be cached"
            )
        is_whole = int(mask.sum()) == count and bool(mask[:count].all())
        if not is_whole or not torch.equal(ids[:count].cpu(), tokens):
            raise ValueError(
                "the collator must keep each row's tokens and pad on the right to use cached "
                f"states; it changed row {number}, or attention_mask holds 0 in that row"
            )

"""Types of training data: a row, a data set, a batch, and the collator that makes one of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Label of a token without loss; torch's cross-entropy ignores this value by default.
IGNORED = -100

Row = Mapping[str, Any]  # `input_ids`, `labels`, and further columns for a collator of the user
Dataset = Sequence[Row]
Batch = Mapping[str, Tensor]
Collate = Callable[[list[Row]], Batch]

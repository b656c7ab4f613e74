"""Put the rows of a batch one after the other, without padding.

A batch of two rows becomes one row of all their tokens, whose positions begin again at each row.
Attention has to see from the positions that rows are apart; ``check_packing`` tries the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from ila.boundary import reading
from ila.data.contracts import Collate, Dataset, Row

_KNOWN = {"input_ids", "labels", "attention_mask"}


def packing_collator() -> Collate:
    """Return the collator that packs; it reads token ids and labels of a row."""
    return DataCollatorWithFlattening()


def check_packing(model: nn.Module, dataset: Dataset) -> None:
    """Raise if rows in one pack would not be trained as rows apart.

    Raises:
        ValueError: If rows hold more than token ids and labels, hide tokens, or the model lets the
            tokens of a row look at another row of its pack.
    """
    for number, row in enumerate(dataset):
        unknown = sorted(set(row) - _KNOWN)
        if unknown:
            raise ValueError(f"packing knows no column {unknown[0]!r}, which row {number} has")
        if not torch.as_tensor(row.get("attention_mask", [1])).bool().all():
            raise ValueError(f"packing keeps every token; attention_mask of row {number} hides one")
    name = type(model).__name__
    with reading(name, "packing cannot be tried on model"):
        alike = _second_row_is_alike(model, dataset)
    if not alike:
        raise ValueError(
            f"packing would not be exact: in {name} the tokens of a row look at the row before it "
            "in its pack; train without packing, or with another attn_implementation"
        )


def _second_row_is_alike(model: nn.Module, dataset: Dataset) -> bool:
    """Tell whether a row has the same logits, to the bit, behind another first row."""
    first, second = dataset[0], dataset[-1]
    ids = torch.as_tensor(first["input_ids"])
    # Other ids of the same row: they are in the vocabulary.
    changed = {**first, "input_ids": ids.roll(1).tolist()}
    if torch.equal(torch.as_tensor(changed["input_ids"]), ids):
        changed["input_ids"] = torch.as_tensor(second["input_ids"])[:1].expand(len(ids)).tolist()
    one, other = (_logits(model, [row, second], len(ids)) for row in (first, changed))
    return torch.equal(one, other)


def _logits(model: nn.Module, rows: list[Row], start: int) -> Tensor:
    batch = packing_collator()(rows)
    device = next(model.parameters()).device
    named = {key: batch[key].to(device) for key in ("input_ids", "position_ids")}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**named, use_cache=False).logits[:, start:]
    finally:
        model.train(training)

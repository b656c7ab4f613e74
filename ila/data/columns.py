"""One column of a batch: the values of its rows, as one tensor."""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

Values = Sequence[float] | Tensor | float
# A row has one value a token in these columns.
_OF_TOKENS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "token_type_ids", "special_tokens_mask"}
)


def pad_column(
    name: str,
    values: Sequence[Values | None],
    lengths: Sequence[int],
    width: int,
    fills: Mapping[str, int],
) -> Tensor | None:
    """Make a tensor of one value of each row.

    Args:
        name: The column's name.
        values: Value of each row.
        lengths: Tokens of each row.
        width: Tokens of the batch, at least the longest row.
        fills: Padding of the columns that 0 does not pad.

    Returns:
        Shape (rows, width), padded on the right, where every row has one value a token, else
        (rows, …) for values of one shape; integers are int64. None where no row has a value.

    Raises:
        ValueError: The column cannot become a tensor.

    >>> pad_column("position_ids", [[0, 1], [0]], [2, 1], 2, {}).tolist()
    [[0, 1], [0, 0]]
    """
    if all(value is None for value in values):
        return None
    tensors = [_tensor(name, value) for value in values]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    has_one_a_token = all(
        tensor.shape == (length,) for tensor, length in zip(tensors, lengths, strict=True)
    )
    if has_one_a_token:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        padded = torch.full((len(tensors), width), fills.get(name, 0), dtype=dtype)
        for row, tensor in zip(padded, tensors, strict=True):
            row[: len(tensor)] = tensor
        return padded
    is_of_tokens = name in _OF_TOKENS or (name == "labels" and len(min(shapes)) > 0)
    if len(shapes) > 1 or (is_of_tokens and any(length != width for length in lengths)):
        raise ValueError(
            f"rows must have one value for each token in {name}, or values of one shape; got "
            f"shapes {sorted(shapes)} in rows of {sorted(set(lengths))} tokens, padded to {width}"
        )
    return torch.stack(tensors)


def _tensor(name: str, value: Values | None) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"column {name!r} of rows cannot become a tensor, got {value!r:.60}; remove it "
            "from the rows if the model does not need it"
        ) from error
    if tensor.numel() == 0:  # an empty list says nothing of its type
        tensor = tensor.to(torch.int64)
    is_whole = not (tensor.is_floating_point() or tensor.is_complex())
    if is_whole and (tensor.dtype != torch.bool or name in _OF_TOKENS):
        return tensor.to(torch.int64)
    if name == "input_ids":
        raise ValueError(f"input_ids must be integers, got {tensor.dtype}")
    return tensor

"""Encode rows to tokens, with the loss on the answers only.

    labels = input_ids where a token belongs to an answer, else -100

``ila.data.rendering`` finds the answers in the text. The text is tokenised once, as far as the
longest row allows. An answer begins at the first token that reaches into it: a token across the
border between prompt and answer counts as answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ila.data.columns import Values, pad_column
from ila.data.contracts import IGNORED, Row
from ila.data.row_encoder import RowEncoder
from ila.runs.progress import bar

_FILLS = {"labels": IGNORED, "special_tokens_mask": 1}
_RENAMED = {"label": "labels", "label_ids": "labels"}
# About two seconds of work at the 0.5 to 1 ms a short row takes.
_ROWS_WORTH_A_BAR = 3000
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class DataSummary:
    """Counts of ``encode``; kept and dropped rows add up to all rows.

    Attributes:
        rows: Rows given.
        kept: Rows encoded.
        truncated: Kept rows that lost tokens at the right end.
        dropped_no_answer: Rows in which every answer is empty, missing or of weight 0.
        dropped_no_room: Rows with no answer token left after truncation.
        tokens: Tokens of the kept rows.
        answer_tokens: Tokens of the kept rows that carry loss.
        unused: Columns of rows, and keys of messages (``messages.…``), with a value that does not
            reach the text.
    """

    rows: int
    kept: int
    truncated: int
    dropped_no_answer: int
    dropped_no_room: int
    tokens: int
    answer_tokens: int
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Write the counts in one sentence, for a log or a terminal."""
        lost = (
            (self.truncated, "truncated"),
            (self.dropped_no_answer, "dropped without an answer"),
            (self.dropped_no_room, "dropped with no room for one within the longest row"),
        )
        parts = [f"{self.kept:,} of {self.rows:,} rows"]
        parts += [f"{count:,} {fate}" for count, fate in lost if count]
        tokens = f"{self.tokens:,} tokens, {self.answer_tokens:,} of them in answers"
        more = len(self.unused) - _NAMES_SHOWN
        names = ", ".join(self.unused[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        unused = f" Not used: {names}." if names else ""
        return f"{', '.join(parts)}; {tokens}.{unused}"

    def as_dict(self) -> dict[str, int | list[str]]:
        """Give the counts and names, for JSON."""
        return {**asdict(self), "unused": list(self.unused)}


def encode(
    rows: Sequence[Mapping[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    progress: bool = True,
    numbers: Sequence[int] | None = None,
) -> tuple[list[dict[str, list[int]]], DataSummary]:
    """Turn rows into token ids and labels, with loss on the answers only.

    Every assistant turn is an answer, except one that opens a conversation (it answers nothing) and
    one of ``weight`` 0. In a row of plain text all of the text is the answer. The first token of a
    row never carries loss: nothing comes before it to predict it from.

    A row's ``tools`` are given to the chat template. Calls of tools are given to it with their
    arguments as objects, or as JSON text if it takes no objects; without a template a call is a
    line of JSON. An answer that ends in the end token already gets no second one.

    Args:
        rows: Rows in the forms of ``ila.data.messages.to_messages``.
        tokenizer: Tokenizer; its chat template is used if it has one, the plain one of
            ``ila.data.rendering`` otherwise.
        max_length: Longest row in tokens, at least 2; longer rows are cut at the right end. Little
            more than that is rendered and tokenised.
        progress: Whether to show a progress bar on stderr, if there are rows enough to wait for.
        numbers: Number of each row in the user's file, from 1, for errors; None counts the given
            rows.

    Returns:
        (encoded, summary): for every kept row, in order, ``{"input_ids", "labels"}`` as lists of
        equal length, labels -100 outside the answers; and the counts, with the names of unused
        columns.

    Raises:
        ValueError: No rows, every row dropped, ``max_length`` below 2, a row of no known form or
            with an unknown part, or a conversation that the chat template refuses or in which
            answers cannot be told apart.
    """
    _check(rows, max_length)
    encoder = RowEncoder(tokenizer, max_length)
    encoded, truncated, no_answer, no_room = [], 0, 0, 0
    places = range(1, len(rows) + 1) if numbers is None else numbers
    for number, row in zip(places, _watched(rows, progress), strict=True):
        full = _encoded(encoder, row, number)
        if full is None:
            no_answer += 1
            continue
        cut = {name: values[:max_length] for name, values in full.items()}
        if all(label == IGNORED for label in cut["labels"]):
            no_room += 1
            continue
        truncated += len(full["input_ids"]) > max_length
        encoded.append(cut)
    if not encoded:
        raise ValueError(
            f"all {len(rows)} were dropped, {no_answer} without an answer and {no_room} with "
            f"no answer token within max_length={max_length}; fields of the first: {list(rows[0])}"
        )
    summary = DataSummary(
        rows=len(rows),
        kept=len(encoded),
        truncated=truncated,
        dropped_no_answer=no_answer,
        dropped_no_room=no_room,
        tokens=sum(len(row["input_ids"]) for row in encoded),
        answer_tokens=sum(label != IGNORED for row in encoded for label in row["labels"]),
        unused=tuple(encoder.unused),
    )
    return encoded, summary


def _check(rows: Sequence[Row], max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if len(rows) == 0:
        raise ValueError("rows must hold at least one row, got none")


def _encoded(encoder: RowEncoder, row: Row, number: int) -> dict[str, list[int]] | None:
    try:
        return encoder(row)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find an id to pad with: the padding token's, else the end-of-sequence token's.

    Args:
        tokenizer: Any tokenizer; not changed.

    Returns:
        The id. Padding is masked and carries no loss, so either does.

    Raises:
        ValueError: The tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("tokenizer must have a pad_token or an eos_token, got neither")


@dataclass(frozen=True)
class Collator:
    """Pad encoded rows on the right into one batch.

    Attributes:
        pad_token_id: Id that fills ``input_ids``.
        pad_to_multiple_of: Round the batch's length up to a multiple of this; None leaves it at the
            longest row.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        """Refuse a multiple below 1."""
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of must be None or at least 1, got {self.pad_to_multiple_of}"
            )

    def __call__(self, rows: Sequence[Mapping[str, Values]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            rows: At least one row, as ``encode`` returns them or with more columns. All have the
                same columns, ``input_ids`` among them; a ``label`` is called ``labels``, as
                ``transformers`` does.

        Returns:
            Every column, rows first. A column with a value for each token is padded on the right:
            ``input_ids`` with the pad id, ``labels`` with -100, ``attention_mask`` and the others
            with 0. An ``attention_mask`` (1 on rows, 0 on padding) is added where rows have none.
            Not to rows with ``position_ids``, though: those may hold several sequences, which
            models keep apart by the positions alone, and only without a mask.

        Raises:
            ValueError: No rows, rows with different columns, or a column that is no tensor.

        >>> batch = Collator(0)([{"input_ids": [5, 6], "labels": [-100, 6]}])
        >>> batch["labels"].tolist()
        [[-100, 6]]
        """
        if not rows:
            raise ValueError("rows must hold at least one row, got none")
        names = _columns(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        step = self.pad_to_multiple_of or 1
        width = -(-max(lengths) // step) * step
        fills = _FILLS | {"input_ids": self.pad_token_id}
        batch = {}
        for name in names:
            column = pad_column(name, [row[name] for row in rows], lengths, width, fills)
            if column is not None:
                batch[_RENAMED.get(name, name)] = column
        if "attention_mask" not in batch and "position_ids" not in batch:
            ones = [[1] * length for length in lengths]
            batch["attention_mask"] = pad_column("attention_mask", ones, lengths, width, fills)
        return batch


def token_count(row: Mapping[str, Values]) -> int:
    """Count the tokens of a row, its own padding left out.

    >>> token_count({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]})
    2
    """
    mask = row.get("attention_mask")
    return len(row["input_ids"]) if mask is None else int(torch.as_tensor(mask).bool().sum())


def _columns(rows: Sequence[Mapping]) -> list[str]:
    names = rows[0].keys()
    for index, row in enumerate(rows):
        if "input_ids" not in row or row.keys() != names:
            lacking = sorted({"input_ids", *names, *row} - (row.keys() & names))
            raise ValueError(
                "rows must have the same columns, input_ids among them; rows 0 and "
                f"{index} of the batch do not share {lacking}"
            )
    twice = [name for name in ("labels", *_RENAMED) if name in names]
    if len(twice) > 1:
        raise ValueError(f"rows must have one column of labels, got {twice}")
    return list(names)


def _watched(rows: Sequence[Row], progress: bool) -> Iterable[Row]:
    show = progress and len(rows) >= _ROWS_WORTH_A_BAR
    return bar(rows, "Encoding", show=show, transient=True)

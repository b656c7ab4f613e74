"""Rows to tokens: the loss is on the answers only.

    labels = input_ids where a token belongs to an answer, else -100

``ila.data.rendering`` says which stretches of the text are answers. The text is tokenised once; a
stretch begins at the first token at which the text up to it, tokenised alone, departs from the
whole. That asks nothing of the tokenizer but that it be deterministic, and a token that straddles
the border between prompt and answer counts as answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from ila.data.messages import to_messages
from ila.data.rendering import common_prefix, render_chat, render_plain

IGNORED = -100
# About two seconds of work at the 0.5 to 1 ms a short row takes.
_ROWS_WORTH_A_BAR = 3000


@dataclass(frozen=True)
class DataSummary:
    """What ``encode`` made of its rows; kept and dropped rows add up to all rows.

    Attributes:
        rows: Rows given.
        kept: Rows encoded.
        truncated: Kept rows that lost tokens at the right end.
        dropped_no_answer: Rows whose answers are all empty or missing.
        dropped_no_room: Rows with no answer token left after truncation.
        tokens: Tokens of the kept rows.
        answer_tokens: Tokens of the kept rows that carry loss.
    """

    rows: int
    kept: int
    truncated: int
    dropped_no_answer: int
    dropped_no_room: int
    tokens: int
    answer_tokens: int

    def __str__(self) -> str:
        """Say it in one sentence, for a log or a terminal."""
        lost = (
            (self.truncated, "truncated"),
            (self.dropped_no_answer, "dropped without an answer"),
            (self.dropped_no_room, "dropped with no room for one within the longest row"),
        )
        parts = [f"{self.kept:,} of {self.rows:,} rows"]
        parts += [f"{count:,} {what}" for count, what in lost if count]
        tokens = f"{self.tokens:,} tokens, {self.answer_tokens:,} of them in answers"
        return f"{', '.join(parts)}; {tokens}."

    def as_dict(self) -> dict[str, int]:
        """Give the counts by name, for JSON."""
        return asdict(self)


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

    Args:
        rows: Rows in the forms of ``ila.data.rows.to_messages``.
        tokenizer: Tokenizer; its chat template is used if it has one, the plain one of
            ``ila.data.rendering`` otherwise.
        max_length: Longest row in tokens, at least 2; longer rows are cut at the right end.
        progress: Show a progress bar on stderr when there are rows enough to wait for.
        numbers: The number of each row in the user's file, from 1, for errors; None counts the rows
            given.

    Returns:
        (encoded, summary): for every kept row, in order, ``{"input_ids", "labels"}`` as lists of
        equal length, labels -100 outside the answers; and the counts.

    Raises:
        ValueError: No rows, every row dropped, ``max_length`` below 2, a row of no known form, or a
            conversation that the chat template refuses or in which answers cannot be told apart.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if len(rows) == 0:
        raise ValueError("rows must hold at least one row, got none")
    encoded, truncated, no_answer, no_room = [], 0, 0, 0
    for index, row in enumerate(_watched(rows, progress)):
        try:
            full = _encode_row(row, tokenizer)
        except ValueError as error:
            number = index + 1 if numbers is None else numbers[index]
            raise ValueError(f"row {number}: {error}") from error
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
    )
    return encoded, summary


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
    """Pads encoded rows on the right into one batch.

    Attributes:
        pad_token_id: Id that fills ``input_ids``.
        pad_to_multiple_of: Round the batch's length up to a multiple of this; None leaves it at the
            longest row.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        """Refuse a multiple that is none."""
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of must be None or at least 1, got {self.pad_to_multiple_of}"
            )

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            rows: Rows as ``encode`` returns them, at least one.

        Returns:
            ``input_ids``, ``attention_mask`` (1 on rows, 0 on padding) and ``labels`` (-100 on
            padding), int64, each of shape (rows, length).

        Raises:
            ValueError: No rows.

        >>> batch = Collator(0)([{"input_ids": [5, 6], "labels": [-100, 6]}])
        >>> batch["labels"].tolist()
        [[-100, 6]]
        """
        if not rows:
            raise ValueError("rows must hold at least one row, got none")
        step = self.pad_to_multiple_of or 1
        length = -(-max(len(row["input_ids"]) for row in rows) // step) * step

        def stack(sequences: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            padded = [[*one, *[fill] * (length - len(one))] for one in sequences]
            return torch.tensor(padded, dtype=torch.long)

        return {
            "input_ids": stack([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": stack([row["labels"] for row in rows], IGNORED),
        }


def _watched(rows: Sequence, progress: bool) -> Iterator:
    quiet = not progress or len(rows) < _ROWS_WORTH_A_BAR
    screen = Console(stderr=True)
    return track(rows, "Encoding", console=screen, transient=True, disable=quiet)


def _encode_row(row: Mapping, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]] | None:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a dict, got {type(row).__name__}")
    messages = to_messages(row)
    turns = [i for i, message in enumerate(messages) if _is_answer(i, message)]
    if not turns:
        return None
    messages = messages[: turns[-1] + 1]
    if tokenizer.chat_template and messages[0]["role"] != "text":
        text, spans = render_chat(messages, turns, tokenizer)
        start = []
    else:
        text, spans = render_plain(messages, turns, tokenizer.eos_token)
        start = _opening(tokenizer)
    ids = _ids(text, tokenizer)
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        first = common_prefix(_ids(text[:begin], tokenizer), ids)
        last = len(ids) if end == len(text) else common_prefix(_ids(text[:end], tokenizer), ids)
        labels[first:last] = ids[first:last]
    ids, labels = start + ids, [IGNORED] * len(start) + labels
    if labels:
        labels[0] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _is_answer(index: int, message: Mapping) -> bool:
    if message["role"] == "text":
        return bool(message["content"].strip())
    if message["role"] != "assistant" or index == 0 or message.get("weight") == 0:
        return False
    return bool(message["content"].strip() or message.get("tool_calls"))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: long rows are cut later, no need to warn about model_max_length.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the begin-of-sequence token, for tokenizers that put one before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []

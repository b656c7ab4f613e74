"""Encode one row to tokens, no further than the longest row allows.

A row of eight hundred turns, or of three hundred megabytes in one line, costs no more than its
first ``max_length`` tokens: later turns are not rendered, and later text is not tokenised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ila.data.contracts import IGNORED
from ila.data.messages import Conversation, to_conversation
from ila.data.pieces import Pieces
from ila.data.rendering import ChatTemplate, Spans, render_plain

# Text is about 4 characters a token. Where these do not fill a row, more are taken.
_CHARACTERS_PER_TOKEN = 8
# Tokens after the cut: within these a tokenizer may still decide otherwise for more text.
_MARGIN = 64
# Tokenizers take two hundred bytes a character, and abort the process when memory runs out.
_LONGEST_TEXT = 2**24
# Keys of a message that every template knows, and keys that only hold a message together.
_OF_MESSAGES = frozenset({"role", "content", "weight", "tool_calls", "id", "tool_call_id"})
_THOUGHTS = frozenset({"reasoning_content", "reasoning", "thinking"})


@dataclass(frozen=True)
class RowEncoder:
    """Encode rows one by one, and remember the columns that were not used.

    Attributes:
        tokenizer: Tokenizer; its chat template is used if it has one.
        max_length: Tokens of a row that matter, at least 2.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, row: Mapping) -> dict[str, list[int]] | None:
        """Encode a row to its end, or to more than ``max_length`` tokens; None without answers."""
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be a dict, got {type(row).__name__}")
        said = to_conversation(row)
        self._note_unused(said)
        turns = [i for i, message in enumerate(said.messages) if _is_answer(i, message)]
        if not turns:
            return None
        room = self.max_length * _CHARACTERS_PER_TOKEN
        while True:
            encoded, is_whole = self._within(room, said, turns)
            if is_whole or len(encoded["input_ids"]) >= self.max_length + _MARGIN:
                return encoded
            if room >= _LONGEST_TEXT:
                raise ValueError(
                    f"its text is longer than {_LONGEST_TEXT:,} characters, and those are fewer "
                    f"than max_length={self.max_length} tokens; split the row"
                )
            room *= 4

    def _within(
        self, room: int, said: Conversation, turns: list[int]
    ) -> tuple[dict[str, list[int]], bool]:
        """Encode about the first ``room`` characters; say whether those were all."""
        room, length, last = min(room, _LONGEST_TEXT), 0, 0
        while last < len(turns) and length < room:
            start = turns[last - 1] + 1 if last else 0
            length += sum(len(m["content"]) for m in said.messages[start : turns[last] + 1])
            last += 1
        text, spans, start = self._rendered(said, turns[:last])
        is_whole = last == len(turns) and len(text) <= room
        pieces = Pieces(text[:room], self.tokenizer)
        ids, labels = pieces.ids, [IGNORED] * len(pieces.ids)
        for begin, end in spans:
            first, stop = pieces.before(begin), pieces.before(end)
            labels[first:stop] = ids[first:stop]
        if ids[: len(start)] != start:
            ids, labels = start + ids, [IGNORED] * len(start) + labels
        if labels:
            labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels}, is_whole

    def _rendered(self, said: Conversation, turns: list[int]) -> tuple[str, Spans, list[int]]:
        """Give the text up to the last of the turns, its answers, and the tokens before it."""
        messages = said.messages[: turns[-1] + 1]
        if self._template is not None and messages[0]["role"] != "text":
            return (*self._template.render(messages, turns, said.tools), [])
        return (*render_plain(messages, turns, self.tokenizer.eos_token), self._opening)

    def _note_unused(self, said: Conversation) -> None:
        reads = self._template.reads if self._template else lambda name: False
        names = dict.fromkeys(said.unused)
        if said.tools and not reads("tools"):
            names["tools"] = None
        for message in said.messages:
            for key in message.keys() - _OF_MESSAGES:
                if not any(reads(name) for name in (_THOUGHTS if key in _THOUGHTS else (key,))):
                    names[f"messages.{key}"] = None
        self.unused.update(names)

    @cached_property
    def unused(self) -> dict[str, None]:
        """Unused columns and keys, in the order of their first appearance."""
        return {}

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate(self.tokenizer) if self.tokenizer.chat_template else None

    @cached_property
    def _opening(self) -> list[int]:
        """Give the begin-of-sequence token, for tokenizers that put one before every text."""
        bos = self.tokenizer.bos_token_id
        is_put = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        return [bos] if is_put else []


def _is_answer(index: int, message: Mapping) -> bool:
    if message.get("weight") == 0:
        return False
    if message["role"] == "text":
        return bool(message["content"].strip())
    if message["role"] != "assistant" or index == 0:
        return False
    return bool(message["content"].strip() or message.get("tool_calls"))

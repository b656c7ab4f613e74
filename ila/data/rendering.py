r"""Conversations to text, and where in the text the answers stand.

With a chat template the text is the whole conversation as the template renders it. An answer begins
where the prompt ends, rendered up to that turn with its generation prompt, and ends where the
conversation up to and including the turn ends. Both must be beginnings of the text; a template for
which they are not is refused rather than trained on in the wrong places.

To render all turns before each answer would take time quadratic in their number. A later answer is
therefore rendered after the first answer and the turns since the one before it, and must then stand
in the text letter for letter; only where it does not are all turns before it rendered.

Without a template, every turn is followed by a blank line, and every answer by the end-of-sequence
token instead (by a blank line where the tokenizer has none); empty turns are left out. A tool call
is a line of JSON:

    {instruction}\n\n{answer}{eos}

The end of a turn belongs to the answer: a model not trained on it does not stop. An answer that
ends in it already does not get a second one.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ila.boundary import in_one_line

Spans = list[tuple[int, int]]

_REFUSED = (
    "the chat template writes earlier turns differently when later ones follow, or leaves out an "
    "answer; give one row per assistant turn, or a tokenizer with another chat template"
)
_NO_CALLS = (
    "the chat template leaves out the tool calls of an answer; take a tokenizer with a chat "
    "template for tools"
)
_PROBE = "xyzzy"
_ROLES_SHOWN = 8


def common_prefix(left: Sequence, right: Sequence) -> int:
    """Count the leading items that two texts, or two lists, have in common.

    >>> common_prefix("prompt: x", "prompt: y")
    8
    """
    if right[: len(left)] == left:
        return len(left)
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(right))


def render_plain(
    messages: Sequence[Mapping], turns: Collection[int], eos: str | None
) -> tuple[str, Spans]:
    r"""Render a conversation without a chat template.

    Args:
        messages: Turns with ``role``, ``content`` and perhaps ``tool_calls``.
        turns: Places of the answers, ascending.
        eos: The end-of-sequence token's text, if there is one.

    Returns:
        (text, spans): characters ``[begin, end)`` of each answer, its end of turn included.

    >>> turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> render_plain(turns, [1], "</s>")
    ('2 + 2?\n\n4</s>', [(8, 13)])
    """
    answers, parts, spans, length = set(turns), [], [], 0
    for index, message in enumerate(messages):
        said = message["content"]
        if message.get("tool_calls"):
            said = "\n".join([*([said] if said.strip() else []), *_as_lines(message["tool_calls"])])
        if not said.strip():
            continue
        if message["role"] in ("assistant", "text") and eos:
            said = without_end(said, (eos,)) + eos
        else:
            said += "\n\n"
        parts.append(said)
        if index in answers:
            spans.append((length, length + len(said)))
        length += len(said)
    return "".join(parts), spans


def without_end(text: str, marks: Sequence[str]) -> str:
    r"""Cut the marks off the end of a text, and the white space after them.

    >>> without_end("yes </s>\n", ["</s>"]), without_end("yes\n", ["</s>"])
    ('yes ', 'yes\n')
    """
    while True:
        bare = text.rstrip()
        mark = next((mark for mark in marks if mark and bare.endswith(mark)), None)
        if mark is None:
            return text
        text = bare.removesuffix(mark)


def _as_lines(calls: Sequence[Mapping]) -> list[str]:
    functions = (call["function"] for call in calls)
    shown = ({"name": f["name"], "arguments": f.get("arguments", {})} for f in functions)
    return [json.dumps(call, ensure_ascii=False) for call in shown]


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, as the judge of where answers stand.

    Attributes:
        tokenizer: Tokenizer with a chat template.
    """

    tokenizer: PreTrainedTokenizerBase

    def render(
        self, messages: list[dict], turns: Sequence[int], tools: list[dict] | None = None
    ) -> tuple[str, Spans]:
        """Render a conversation.

        Args:
            messages: Turns as chat templates take them; the last one is an answer.
            turns: Places of the answers, ascending; not the first turn.
            tools: Tools offered in it, given to the template.

        Returns:
            (text, spans): characters ``[begin, end)`` of each answer, its end of turn included.

        Raises:
            ValueError: The template refuses the conversation, answers cannot be told apart in it,
                or it leaves out the tool calls of an answer.
        """
        messages = [self._ended_once(message) for message in messages]
        text = self._apply(messages, tools)
        whole = _Rendered(self, messages, tools, text)
        spans = whole.in_windows(turns) or whole.in_full(turns)
        for turn, (begin, end) in zip(turns, spans, strict=True):
            for call in messages[turn].get("tool_calls", ()):
                name = call["function"]["name"]
                # The words beside a call may name it as well.
                if text.count(name, begin, end) <= messages[turn]["content"].count(name):
                    raise ValueError(_NO_CALLS)
        return text, spans

    def shown(self, messages: list[dict]) -> list[dict]:
        """Give messages as the template reads them: their text plain, or as lists of parts."""
        return _in_parts(messages) if self._takes_parts else messages

    def reads(self, name: str) -> bool:
        """Tell whether the template mentions a name: ``tools``, or a key of messages."""
        return name in self._source

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The tokens that no text of a user holds by chance."""
        return tuple(self.tokenizer.get_added_vocab())

    @cached_property
    def _source(self) -> str:
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """Marks that the template writes after an answer; an answer need not end in one."""
        eos = self.tokenizer.eos_token
        try:
            _, probe, tail = self._apply(_probe(), None).rpartition(_PROBE)
        except ValueError:  # it wants more than two turns: then only the end-of-sequence token
            probe, tail = _PROBE, eos if eos and self.reads("eos_token") else ""
        tail = tail.strip() if probe else ""
        if not tail:
            return ()
        return tuple(dict.fromkeys([*(m for m in self.marks if m in tail), tail, eos or tail]))

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether it passes over plain text and reads a list of parts, as models of images do."""

        def shows(turns: list[dict]) -> bool:
            try:
                return _PROBE in self._rendered(turns, None, False)
            except Exception:
                return False

        return not shows(_probe()) and shows(_in_parts(_probe()))

    def _ended_once(self, message: dict) -> dict:
        if message["role"] != "assistant":
            return message
        content = without_end(message["content"], self._ends)
        return message if content == message["content"] else {**message, "content": content}

    def _apply(
        self, messages: list[dict], tools: list[dict] | None, *, opens_answer: bool = False
    ) -> str:
        try:
            return self._rendered(self.shown(messages), tools, opens_answer)
        except Exception as error:
            # Most templates write the arguments of a call as JSON; some add them to text.
            texts = _with_arguments_as_text(messages) if isinstance(error, TypeError) else None
            if texts is not None:
                return self._apply(texts, tools, opens_answer=opens_answer)
            roles = [message["role"] for message in messages]
            more = ", …" if len(roles) > _ROLES_SHOWN else ""
            where = f" of {self.tokenizer.name_or_path}" if self.tokenizer.name_or_path else ""
            raise ValueError(
                f"the chat template{where} refused a conversation of "
                f"{', '.join(roles[:_ROLES_SHOWN])}{more}: {in_one_line(error)}"
            ) from error

    def _rendered(self, messages: list[dict], tools: list[dict] | None, opens_answer: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=opens_answer
        )


@dataclass(frozen=True)
class _Rendered:
    """A whole conversation and its text, in which answers are looked for."""

    template: ChatTemplate
    messages: list[dict]
    tools: list[dict] | None
    text: str

    def in_full(self, turns: Sequence[int]) -> Spans:
        """Find every answer after all turns before it."""
        answers = [self._answer(0, 0, 0, 0, turn + 1) for turn in turns]
        if None in answers:
            raise ValueError(_REFUSED)
        return [(begin, end) for begin, end, _ in answers]

    def in_windows(self, turns: Sequence[int]) -> Spans | None:
        """Find every answer after an early one and its own prompt; None if one is not there.

        The result of a tool follows the first answer that calls one, since some templates refuse it
        elsewhere; any other turn follows the first answer that calls none.
        """
        heads: dict[bool, tuple[int, int]] = {}
        at, spans = 0, []
        for turn, before in zip(turns, (-1, *turns), strict=False):
            follows_call = self.messages[before + 1]["role"] == "tool"
            count, length = heads.get(follows_call, (0, 0))
            start = (at, before + 1) if count else (0, 0)
            try:
                answer = self._answer(count, length, *start, turn + 1)
            except ValueError:  # a template that wants the turns left out
                return None
            if answer is None:
                return None
            begin, end, at = answer
            spans.append((begin, end))
            heads.setdefault(bool(self.messages[turn].get("tool_calls")), (turn + 1, at))
        return spans if at == len(self.text) else None

    def _answer(
        self, count: int, length: int, at: int, start: int, stop: int
    ) -> tuple[int, int, int] | None:
        """Find the last of the turns ``[start, stop)``, which stand at ``at`` in the text.

        Args:
            count: Turns at the beginning that are rendered before them.
            length: Characters of the text that those take.
            at: Where the turns begin in the text.
            start: The first of the turns.
            stop: The turn after the answer.

        Returns:
            Begin and end of the answer, and begin of the next turn; None if the turns do not render
            to the text.
        """
        window, head = self.messages[:count] + self.messages[start:stop], self.text[:length]
        upto = self.text if len(window) == len(self.messages) else self._apply(window)
        prompt = self._apply(window[:-1], opens_answer=True)
        if not (upto.startswith(head) and prompt.startswith(head)):
            return None
        if not self.text.startswith(upto[length:], at):
            return None
        shift = at - length
        begin = length + common_prefix(prompt[length:], self.text[at : shift + len(prompt)])
        # Some templates open a thought for the model to continue and write none into past turns:
        # the answer then begins where the text leaves the generation prompt.
        if begin < len(prompt):
            asked = self._apply(window[:-1])
            if not prompt.startswith(asked) or len(asked) > begin:
                return None
        # Whitespace after an end-of-turn token is the template's: generation has stopped by then.
        bare = upto.rstrip()
        marks = self.template.marks
        end = len(bare) if marks and bare.endswith(marks) else len(upto)
        return (shift + begin, shift + end, shift + len(upto)) if begin < end else None

    def _apply(self, messages: list[dict], *, opens_answer: bool = False) -> str:
        return self.template._apply(messages, self.tools, opens_answer=opens_answer)


def _probe() -> list[dict]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]


def _in_parts(messages: list[dict]) -> list[dict]:
    texts = ([{"type": "text", "text": m["content"]}] if m["content"] else [] for m in messages)
    return [{**m, "content": parts} for m, parts in zip(messages, texts, strict=True)]


def _with_arguments_as_text(messages: list[dict]) -> list[dict] | None:
    """Write the arguments of tool calls as JSON text; None if none is an object."""
    changed, texts = False, []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function.get("arguments"), Mapping):
                arguments = json.dumps(function["arguments"], ensure_ascii=False)
                function, changed = {**function, "arguments": arguments}, True
            calls.append({**call, "function": function})
        texts.append({**message, "tool_calls": calls} if calls else message)
    return texts if changed else None

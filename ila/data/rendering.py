r"""Conversations to text, and where in the text the answers stand.

With a chat template the text is what the template makes of the whole conversation. An answer begins
where the prompt ends, rendered up to that turn with its generation prompt, and ends where the
conversation up to and including the turn ends. Both must be beginnings of the text; a template for
which they are not is refused rather than trained on in the wrong places.

Without one, every turn is followed by a blank line, and every answer by the end-of-sequence token
instead (by a blank line where the tokenizer has none); empty turns are left out:

    {instruction}\n\n{answer}{eos}

The end of a turn belongs to the answer: a model not trained on it does not stop.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]

_REFUSED = (
    "the chat template writes earlier turns differently when later ones follow, or leaves out an "
    "answer; give one row per assistant turn, or a tokenizer with another chat template"
)


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
    messages: Sequence[Mapping], turns: Sequence[int], eos: str | None
) -> tuple[str, Spans]:
    r"""Render a conversation without a chat template.

    Args:
        messages: Turns with ``role`` and ``content``.
        turns: Which of them are answers, ascending.
        eos: The end-of-sequence token's text, if there is one.

    Returns:
        (text, spans): characters ``[begin, end)`` of each answer, its end of turn included.

    >>> turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> render_plain(turns, [1], "</s>")
    ('2 + 2?\n\n4</s>', [(8, 13)])
    """
    text, spans = "", []
    for index, message in enumerate(messages):
        if not message["content"].strip():
            continue
        begin = len(text)
        is_last_word = message["role"] in ("assistant", "text")
        text += message["content"] + ((is_last_word and eos) or "\n\n")
        if index in turns:
            spans.append((begin, len(text)))
    return text, spans


def render_chat(
    messages: list[dict], turns: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, Spans]:
    """Render a conversation by the tokenizer's chat template.

    Args:
        messages: Turns as chat templates take them; the last one is an answer.
        turns: Which of them are answers, ascending; not the first turn.
        tokenizer: Tokenizer with a chat template.

    Returns:
        (text, spans): characters ``[begin, end)`` of each answer, its end of turn included.

    Raises:
        ValueError: The template refuses the conversation, or answers cannot be told apart in it.
    """
    text, spans = _apply(messages, tokenizer), []
    marks = tuple(tokenizer.get_added_vocab())
    for turn in turns:
        asked = _apply(messages[:turn], tokenizer)
        prompt = _apply(messages[:turn], tokenizer, add_generation_prompt=True)
        upto = text if turn == turns[-1] else _apply(messages[: turn + 1], tokenizer)
        begin = common_prefix(prompt, text)
        # Some templates open a thought for the model to continue and write none into past turns:
        # the answer then begins where the text leaves the generation prompt.
        is_opened = prompt.startswith(asked) and len(asked) <= begin
        # Whitespace after an end-of-turn token is the template's: generation has stopped by then.
        bare = upto.rstrip()
        end = len(bare) if marks and bare.endswith(marks) else len(upto)
        if (begin < len(prompt) and not is_opened) or not text.startswith(upto) or begin >= end:
            raise ValueError(_REFUSED)
        spans.append((begin, end))
    return text, spans


def _apply(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refused a conversation of {roles}: {error}") from error

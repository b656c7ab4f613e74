"""The turns of a row, found by its field names.

Instruction sets agree on few names, so one table says which are understood; a row that fits none of
them is an error that lists what was found, never a guess.
"""

from collections.abc import Mapping

# First match wins: a prompt field takes the answer field it usually comes with, else any other.
_ANSWERS = {
    "instruction": ("output", "response", "answer", "completion"),
    "question": ("answer", "response", "output", "completion"),
    "prompt": ("completion", "response", "answer", "output"),
    "input": ("output", "response", "answer", "completion"),
}
_EXTRAS = ("input", "context")
_DIALOGUES = ("messages", "conversations")
FIELDS = frozenset(_ANSWERS) | frozenset(_DIALOGUES) | {"text"}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
FORMS = (
    "instruction (+ input or context) with output or response; question with answer; prompt with "
    "completion; messages (role, content); conversations (from, value); text"
)


def to_messages(row: Mapping[str, object]) -> list[dict[str, object]]:
    """Find the turns of a row by its field names.

    Args:
        row: One row, in one of the forms of ``FORMS``. A prompt or completion may be text or a list
            of messages. A field ``system`` or ``system_prompt`` opens the conversation. Missing
            values (None, NaN) read as empty text.

    Returns:
        Messages with at least ``role`` and ``content`` (text), other keys kept. Plain text is one
        message of role ``"text"``. An assistant turn inside a prompt carries ``weight`` 0: it is
        context, not an answer.

    Raises:
        ValueError: No known form, or a field of the wrong type.

    >>> to_messages({"question": "2 + 2?", "answer": "4"})
    [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    """
    for name in _DIALOGUES:
        if row.get(name) is not None:
            return _with_system(row, _messages(row[name], name))
    prompts = [name for name in _ANSWERS if name in row]
    for prompt in prompts:
        for answer in _ANSWERS[prompt]:
            if answer in row:
                return _with_system(row, _pair(row, prompt, answer))
    if "text" in row:
        return [{"role": "text", "content": _text(row["text"], "text")}]
    if prompts:
        return _with_system(row, _pair(row, prompts[0], None))
    if any(name in row for name in _DIALOGUES):
        return []
    found = ", ".join(str(name) for name in row) or "none"
    raise ValueError(f"row has no known form; fields found: {found}; understood: {FORMS}")


def _pair(row: Mapping, prompt: str, answer: str | None) -> list[dict]:
    asked = _side(row[prompt], prompt, "user")
    for message in asked:
        if message["role"] == "assistant":
            message["weight"] = 0
    if not isinstance(row[prompt], list | tuple):
        extras = [_text(row[name], name) for name in _EXTRAS if name in row and name != prompt]
        parts = [text for text in (asked[0]["content"], *extras) if text.strip()]
        asked = [{"role": "user", "content": "\n\n".join(parts)}]
    return asked + (_side(row[answer], answer, "assistant") if answer else [])


def _side(value: object, name: str, role: str) -> list[dict]:
    if isinstance(value, list | tuple):
        return _messages(value, name)
    return [{"role": role, "content": _text(value, name)}]


def _with_system(row: Mapping, messages: list[dict]) -> list[dict]:
    if messages and messages[0]["role"] != "system":
        for name in ("system", "system_prompt"):
            if isinstance(row.get(name), str) and row[name].strip():
                return [{"role": "system", "content": row[name]}, *messages]
    return messages


def _messages(value: object, name: str) -> list[dict]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list of messages, got {type(value).__name__}")
    return [_message(item, name) for item in value]


def _message(item: object, name: str) -> dict:
    if not isinstance(item, Mapping):
        raise ValueError(f"{name} must hold messages (role, content), got {type(item).__name__}")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str):
        raise ValueError(f"{name}: a message must have a role (or from), got keys {list(item)}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list | tuple):
        content = "".join(_part(part, name) for part in content)
    # Tables fill absent keys of a message with None; templates would take those for real.
    known = ("role", "from", "content", "value")
    rest = {k: v for k, v in item.items() if k not in known and v is not None}
    return {"role": _ROLES.get(role, role), "content": _text(content, f"{name} content"), **rest}


def _part(part: object, name: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"{name}: content must be text or a list of text parts, got {part!r:.80}")


def _text(value: object, name: str) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name} must be text, got {type(value).__name__}")

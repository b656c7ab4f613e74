"""The turns of a row, found by its field names.

Instruction sets agree on few names, so one table lists the known ones. A row that fits none of them
is an error with the names of its fields, never a guess. The result also names the columns that were
not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ila.data.turns import from_json, is_missing, read_flag, read_text, read_turn

# First match wins: a prompt field takes the answer field it usually comes with, else any other.
_ANSWERS = {
    "instruction": ("output", "response", "answer", "completion"),
    "question": ("answer", "response", "output", "completion"),
    "prompt": ("completion", "response", "answer", "output"),
    "input": ("output", "response", "answer", "completion"),
}
_EXTRAS = ("input", "context")
_DIALOGUES = ("messages", "conversations")
_SYSTEMS = ("system", "system_prompt")
FIELDS = frozenset(_ANSWERS) | frozenset(_DIALOGUES) | {"text"}
FORMS = (
    "instruction (+ input or context, history) with output or response; question with answer; "
    "prompt with completion; messages (role, content); conversations (from, value); text"
)


@dataclass(frozen=True)
class Conversation:
    """Content of a row.

    Attributes:
        messages: Turns, as ``to_messages`` gives them.
        tools: Offered tools, as a chat template takes them; None without tools.
        unused: Columns with a value that were not read.
    """

    messages: list[dict[str, object]]
    tools: list[dict[str, object]] | None
    unused: tuple[str, ...]


def to_messages(row: Mapping[str, object]) -> list[dict[str, object]]:
    """Find the turns of a row by its field names.

    Args:
        row: One row, in one of the forms of ``FORMS``. A prompt or completion may be text or a list
            of messages. A field ``system`` or ``system_prompt`` opens the conversation, and a
            ``history`` of (prompt, answer) pairs comes before the prompt; its answers are trained
            on like the last one. Missing values (None, NaN) read as empty text. A row whose
            ``train``, ``label`` or ``weight`` is false or 0 has no turn to train on.

    Returns:
        Messages with at least ``role`` and ``content`` (text), other keys kept. Plain text is one
        message of role ``"text"``. ``weight`` 0 marks turns that do not train; an assistant turn
        inside a prompt has it too: it is context, not an answer.

    Raises:
        ValueError: No known form, a field of the wrong type, or a turn that ``read_turn`` refuses.

    >>> to_messages({"question": "2 + 2?", "answer": "4"})
    [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    """
    return to_conversation(row).messages


def to_conversation(row: Mapping[str, object]) -> Conversation:
    """Find the turns of a row, the tools offered in it, and the columns that are not read.

    Args:
        row: One row, as ``to_messages`` takes it. ``tools`` is a list, or JSON text of one.

    >>> to_conversation({"question": "2 + 2?", "answer": "4", "id": 7}).unused
    ('id',)
    """
    messages, used = _turns(row)
    if _is_left_out(row, messages, used):
        messages = [{**message, "weight": 0} for message in messages]
    tools = None
    if messages and messages[0]["role"] != "text":
        tools = _tools(row.get("tools"))
        used.add("tools")
    unused = (name for name, value in row.items() if name not in used and _is_there(value))
    return Conversation(messages, tools, tuple(str(name) for name in unused))


def _turns(row: Mapping) -> tuple[list[dict], set[str]]:
    """Give the turns, and the names of the columns that they were read from."""
    for name in _DIALOGUES:
        if row.get(name) is not None:
            return _with_system(row, _messages(row[name], name), {name})
    prompts = [name for name in _ANSWERS if name in row]
    for prompt in prompts:
        for answer in _ANSWERS[prompt]:
            if answer in row:
                return _pair(row, prompt, answer)
    if "text" in row:
        return [{"role": "text", "content": read_text(row["text"], "text")}], {"text"}
    if prompts:
        return _pair(row, prompts[0], None)
    if any(name in row for name in _DIALOGUES):
        return [], set()
    names = ", ".join(str(name) for name in row) or "none"
    raise ValueError(f"row has no known form; fields found: {names}; understood: {FORMS}")


def _pair(row: Mapping, prompt: str, answer: str | None) -> tuple[list[dict], set[str]]:
    used = {prompt, "history"} | ({answer} if answer else set())
    if isinstance(row[prompt], list | tuple):
        asked = _messages(row[prompt], prompt)
        for message in asked:
            if message["role"] == "assistant":
                message["weight"] = 0
    else:
        extras = [name for name in _EXTRAS if name in row and name != prompt]
        used.update(extras)
        parts = (read_text(row[name], name) for name in (prompt, *extras))
        asked = [{"role": "user", "content": "\n\n".join(p for p in parts if p.strip())}]
    answered = _side(row[answer], answer, "assistant") if answer else []
    return _with_system(row, [*_history(row.get("history")), *asked, *answered], used)


def _side(value: object, name: str, role: str) -> list[dict]:
    if isinstance(value, list | tuple):
        return _messages(value, name)
    return [{"role": role, "content": read_text(value, name)}]


def _history(value: object) -> list[dict]:
    """Read the rounds before a prompt: pairs of prompt and answer, or messages."""
    value = None if value == "" else from_json(value, "history")
    if is_missing(value):
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"history must be a list of pairs, got {type(value).__name__}")
    turns = []
    for item in value:
        if isinstance(item, Mapping):
            turns.append(read_turn(item, "history"))
        elif isinstance(item, list | tuple) and len(item) == 2:
            for role, text in zip(("user", "assistant"), item, strict=True):
                turns.append({"role": role, "content": read_text(text, "history")})
        else:
            raise ValueError(f"history must hold pairs (prompt, answer), got {item!r:.80}")
    return turns


def _with_system(row: Mapping, messages: list[dict], used: set[str]) -> tuple[list[dict], set[str]]:
    if messages and messages[0]["role"] != "system":
        for name in _SYSTEMS:
            if isinstance(row.get(name), str) and row[name].strip():
                return [{"role": "system", "content": row[name]}, *messages], used | {name}
    return messages, used


def _messages(value: object, name: str) -> list[dict]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list of messages, got {type(value).__name__}")
    return [read_turn(item, name) for item in value]


def _tools(value: object) -> list[dict] | None:
    value = from_json(value, "tools") if value != "" else None
    if is_missing(value):
        return None
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list | tuple):
        raise ValueError(f"tools must be a list, got {type(value).__name__}")
    tools = [from_json(tool, "tools") for tool in value]
    wrong = next((tool for tool in tools if not isinstance(tool, Mapping)), None)
    if wrong is not None:
        raise ValueError(f"tools must hold descriptions (objects), got {wrong!r:.80}")
    return [dict(tool) for tool in tools] or None


def _is_left_out(row: Mapping, messages: list[dict], used: set[str]) -> bool:
    """Tell whether a flag of the row leaves it out; the flags count as read."""
    flags = {name for name in ("train", "weight") if not is_missing(row.get(name))}
    label = row.get("label")
    # Many sets call the class of a row its label: text and, beside plain text, numbers.
    if isinstance(label, bool) or str(label).lower() in ("true", "false"):
        flags.add("label")
    elif isinstance(label, int | float) and label == label and messages[:1] != []:
        if messages[0]["role"] != "text":
            raise ValueError(
                "label must be true or false where it says whether to train on a row, "
                f"got {label}; rename a column that says something else"
            )
    used.update(flags)
    return not all([read_flag(row[name], name) for name in sorted(flags)])


def _is_there(value: object) -> bool:
    return not is_missing(value) and value not in ("", [], {}, ())

"""Read one turn of a conversation, of any tool: its role, text, tool calls and weight.

Trainers agree on turns and disagree on their names. Known names become the form of chat templates;
an unknown name is an error, because the model would not learn a turn that we drop in silence.
"""

import json
from collections.abc import Mapping

# Ours, and how others call it: OpenAI, ShareGPT, LLaMA-Factory, Gemini, OpenAssistant, ms-swift.
_SPEAKERS = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": tuple(
        "assistant gpt chatgpt gpt4 gpt_4 model bot chatbot ai bing bard claude".split()
    ),
    "tool": tuple(
        "tool function observation ipython "
        "tool_response tool_result function_response function_result".split()
    ),
}
_CALLS = ("function_call", "tool_call", "tool_calls")
_ROLES = {name: role for role, names in _SPEAKERS.items() for name in names}
_CONTENTS = ("content", "value")
# Whether a turn is trained on: OpenAI; axolotl; XTuner and ms-swift; rows of KTO.
_FLAGS = ("weight", "train", "training", "loss", "label")
_REFUSED_FLAGS = ("train_detail", "loss_scale", "loss_weight", "mask", "masked")
_TAKEN = frozenset({"role", "from", *_CONTENTS, "tool_calls", "function_call"}).union(
    _FLAGS, _REFUSED_FLAGS
)


def read_turn(item: object, name: str) -> dict[str, object]:
    """Read one turn.

    Args:
        item: A mapping with ``role`` (or ``from``), ``content`` (or ``value``), or tool calls.
        name: Column of the turn, for errors.

    Returns:
        ``role``, ``content`` (text), ``tool_calls`` if there are any, ``weight`` 0 if it is not to
        be trained on, and the other keys as they stand.

    Raises:
        ValueError: A role that is not known, no content, a weight that is neither 0 nor 1, or a
            flag that is not understood.

    >>> read_turn({"from": "gpt", "value": "4", "train": False}, "conversations")
    {'role': 'assistant', 'content': '4', 'weight': 0}
    """
    if not isinstance(item, Mapping):
        raise ValueError(f"{name} must hold messages (role, content), got {type(item).__name__}")
    said = item.get("role") if item.get("role") is not None else item.get("from")
    if not isinstance(said, str):
        raise ValueError(f"{name}: a message must have a role (or from), got keys {list(item)}")
    role, calls = _role(said, name), _calls(item, name)
    content = next((item[key] for key in _CONTENTS if item.get(key) is not None), None)
    if role == "call":
        role, calls, content = "assistant", calls + _calls_in(content, said, name), None
    elif not calls and not any(key in item for key in _CONTENTS):
        raise ValueError(f"{name}: a message must have content (or value), got keys {list(item)}")
    turn: dict[str, object] = {"role": role, "content": _content(content, name)}
    if calls:
        turn["tool_calls"] = calls
    if not _is_trained(item, role, name):
        turn["weight"] = 0
    # Tables fill absent keys of a message with None; templates would take those for real.
    turn.update((k, v) for k, v in item.items() if k not in _TAKEN and v is not None)
    return turn


def read_flag(value: object, name: str) -> bool:
    """Read a flag that says whether to train: 0 or 1, false or true, as numbers or as text.

    >>> read_flag("false", "train"), read_flag(1.0, "weight")
    (False, True)
    """
    known = {"0": False, "false": False, "1": True, "true": True, "0.0": False, "1.0": True}
    flag = known.get(str(value).strip().lower())
    if flag is None:
        raise ValueError(
            f"{name} says whether to train on it and must be 0 or 1 (false or true), "
            f"got {value!r:.40}; other weights are not supported"
        )
    return flag


def read_text(value: object, name: str) -> str:
    """Read text: numbers as they print, None and NaN as no text.

    >>> read_text(4, "answer"), read_text(None, "answer")
    ('4', '')
    """
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name} must be text, got {type(value).__name__}")


def is_missing(value: object) -> bool:
    """Tell None and NaN, which tables write where there is nothing.

    >>> is_missing(float("nan"))
    True
    """
    return value is None or (isinstance(value, float) and value != value)


def from_json(value: object, name: str) -> object:
    """Read a value that may stand as JSON text.

    >>> from_json('[{"name": "f"}]', "tools")
    [{'name': 'f'}]
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON where it is text, got {value!r:.40}") from error


def _role(said: str, name: str) -> str:
    key = said.strip().lower().replace("-", "_").replace(" ", "_")
    if key in _CALLS:
        return "call"
    if key not in _ROLES:
        known = ", ".join([*_ROLES, *_CALLS])
        raise ValueError(f"{name}: role {said!r:.40} is not understood; understood: {known}")
    return _ROLES[key]


def _content(content: object, name: str) -> str:
    if isinstance(content, list | tuple):
        return "".join(_part(part, name) for part in content)
    return read_text(content, f"{name} content")


def _part(part: object, name: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"{name}: content must be text or a list of text parts, got {part!r:.80}")


def _calls(item: Mapping, name: str) -> list[dict]:
    """Find the tool calls of a message, in OpenAI's present form and in its older one."""
    present = from_json(item.get("tool_calls") or None, f"{name}: tool_calls")
    older = from_json(item.get("function_call") or None, f"{name}: function_call")
    calls = [] if is_missing(present) else present
    older = [] if is_missing(older) else [older]
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{name}: tool_calls must be a list, got {type(calls).__name__}")
    return [_call(one, name) for one in (*calls, *older)]


def _calls_in(content: object, said: str, name: str) -> list[dict]:
    """Read the calls that a turn of a role of its own writes as JSON."""
    written = from_json(content, f"{name}: a turn of role {said!r}")
    calls = written if isinstance(written, list) else [written]
    if not calls:
        raise ValueError(f"{name}: a turn of role {said!r} must hold a call, got an empty list")
    return [_call(one, name) for one in calls]


def _call(call: object, name: str) -> dict:
    """Write a call as templates take it, its arguments as an object rather than as JSON text."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{name}: a tool call must have a name (and arguments), got {call!r:.80}")
    function = dict(inner)
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            arguments = None  # the model did not write JSON: keep its text
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    if "function" in call:
        return {"type": "function", **call, "function": function}
    return {"type": "function", "function": function}


def _is_trained(item: Mapping, role: str, name: str) -> bool:
    unknown = next((key for key in _REFUSED_FLAGS if item.get(key)), None)
    if unknown:
        raise ValueError(f"{name}: {unknown} of a message is not supported; use weight 0 or 1")
    flags = {key: item[key] for key in _FLAGS if not is_missing(item.get(key))}
    trained = {key: read_flag(value, f"{name}: {key}") for key, value in flags.items()}
    # Every turn has a weight of 1. The other flags ask to train on turns that never train.
    asked = [key for key, is_on in trained.items() if is_on and key != "weight"]
    if asked and role != "assistant":
        raise ValueError(
            f"{name}: {asked[0]} asks to train on a turn of role {role}; only assistant turns are "
            "trained on"
        )
    return all(trained.values())

"""``--config``: a YAML file with options of the commands and fields of ``TrainingArguments``.

Names at the top are of the options that a command has, and of fields for Trainer. A block named
after a command (``learn:``, ``select:``, ``train:``) is for this command alone, and wins. Options
on the command line win over both. So one file serves a search, a selection and a training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from ila.boundary import InputError, reading

VERBS = ("learn", "select", "train")
# Nothing of the kind "read another file", and nothing that `set` would hide.
_NOT_HERE = ("config", "set", "help")
# Options that are text, with true and false among their values.
_WORDS = ("init_lora_weights",)
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class FileFields:
    """Fields of a file that no option has, for ``TrainingArguments``."""

    file: Path | None = None
    values: Mapping[str, object] = field(default_factory=dict)


def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Read the file of ``--config`` and let its options be the defaults of the command.

    The callback of the option; it runs before all other options are read.

    Raises:
        InputError: If the file is no YAML, or a name or value in it cannot be used.
    """
    if file is None:
        context.obj = FileFields()
        return None
    given = _flat(load_yaml(file), context.info_name, file)
    commands = context.parent.command.commands
    known = {verb: _options(commands[verb]) for verb in VERBS}
    mine, defaults, fields = known[context.info_name], {}, {}
    for name, value in given.items():
        if name in mine and name not in _NOT_HERE:
            if value is not None:
                defaults[mine[name].name] = _converted(mine[name], context, value, file)
            continue
        others = [verb for verb in VERBS if name in known[verb]]
        if name in _NOT_HERE or others:
            where = f"put it under {others[0]}:" if others else "leave it out"
            raise InputError(
                f"config {file}: {name} is no option of ila {context.info_name} in a file; {where}"
            )
        fields[name] = value
    if fields and context.info_name == "select":
        raise InputError(f"config {file}: select has no option {sorted(fields)[0]!r}")
    context.default_map = defaults
    context.obj = FileFields(file, fields)
    return file


def load_yaml(file: Path) -> dict[str, object]:
    """Read a YAML file that must hold a mapping; no name may stand twice in it.

    Raises:
        InputError: If the file cannot be read so.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML without names that stand twice: the last would win in silence."""

        def construct_mapping(
            self, node: yaml.MappingNode, deep: bool = False
        ) -> dict[str, object]:
            keys = [key for key, _ in node.value if key.tag != _MERGE]
            names = [self.construct_object(key, deep=True) for key in keys]
            for name in names:
                if not isinstance(name, str):
                    raise InputError(f"config {file}: names must be texts, got {name!r:.80}")
                if names.count(name) > 1:
                    raise InputError(f"config {file}: {name} stands twice in one mapping")
            return super().construct_mapping(node, deep)

    with reading(file, "config"):
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)
    if not isinstance(content, dict):
        got = "nothing" if content is None else type(content).__name__
        raise InputError(f"config {file}: must hold names and values, got {got}")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _flat(content: Mapping[str, object], verb: str, file: Path) -> dict[str, object]:
    """Return the names for one command; its own block wins."""
    blocks = {name: content[name] or {} for name in VERBS if name in content}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise InputError(f"config {file}: {name} must hold names and values, got {block!r:.80}")
    top = {name: value for name, value in content.items() if name not in VERBS}
    own = {name.replace("-", "_"): value for name, value in blocks.get(verb, {}).items()}
    # A selection counts on the options of the search; the top of the file is for trainings.
    return own if verb == "select" else {**top, **own}


def _options(command: Any) -> dict[str, Any]:
    """Return the parameters of a command by the names that a user gives."""
    named = {}
    for parameter in command.params:
        for flag in (*parameter.opts, parameter.name):
            named[flag.lstrip("-").replace("-", "_")] = parameter
    return named


def _converted(parameter: Any, context: typer.Context, value: object, file: Path) -> object:
    """Return the value of an option as the command line would read it."""
    if isinstance(value, bool) and parameter.name in _WORDS:
        value = str(value).lower()
    if isinstance(value, dict | list) or (isinstance(value, bool) is not _is_flag(parameter)):
        kind = "true or false" if _is_flag(parameter) else "one number or text"
        raise InputError(f"config {file}: {parameter.name} must be {kind}, got {value!r:.80}")
    text = value if isinstance(value, bool) else str(value)
    try:
        parameter.process_value(context, text)
    except typer.BadParameter as error:
        raise InputError(f"config {file}: {parameter.name}: {error.message}") from error
    return text


def _is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))

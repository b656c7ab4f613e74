"""Fields of ``TrainingArguments`` from a file of ``--config``, from options and from ``--set``."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from functools import lru_cache
from typing import get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ila.boundary import InputError, reading
from ila.commands.config_file import FileFields
from ila.commands.option_tables import FIELDS, Given
from ila.training.arguments import known_name, why_not
from ila.training.batches import by_length

# Option -> field, where the names differ.
_NAMES = {
    "gradient_accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
    "scheduler": "lr_scheduler_type",
}


def trainer_fields(given: Given, read: FileFields, steps: str) -> dict[str, object]:
    """Return the user's ``training_args``, of the file, of options and of ``--set``; the last wins.

    Args:
        given: Options of the command, by name.
        read: Fields of the file.
        steps: Names of the options that hold the number of steps.

    Raises:
        InputError: If a name is unknown, is decided by an option or by the procedure, or stands
            twice; or if a value is not of its field's type.
    """
    batches = given["gradient_accumulation"]
    if batches is not None and batches < 1:
        raise InputError(f"gradient_accumulation must be ≥ 1, got {batches}")
    fields = {}
    for name, value in read.values.items():
        fields[known_name(name)] = typed(name, value, f"config {read.file}: {name}", steps)
    options = {
        known_name(_NAMES.get(name, name)): value
        for name, value in given.items()
        if name in FIELDS and name not in ("group_by_length", "report_to") and value is not None
    }
    if given["group_by_length"]:
        options |= by_length()
    if given["report_to"] is not None:
        options["report_to"] = _reports(given["report_to"])
    set_here = _set(given["set"], steps)
    for name in options.keys() & set_here.keys():
        raise InputError(f"--set {name}: an option has set {name} already; give it once")
    return {**fields, **options, **set_here}


def typed(name: str, value: object, source: str, steps: str) -> object:
    """Return a value as its field takes it, by the parser of transformers.

    Args:
        name: Name of the field.
        value: A value of YAML.
        source: Place of the value, for errors.
        steps: See ``trainer_fields``.

    >>> typed("weight_decay", "1e-2", "--set weight_decay", "steps")
    0.01
    """
    if name not in TrainingArguments.__dataclass_fields__:
        raise InputError(f"{source} is no option and no field of TrainingArguments")
    reason = why_not(name, steps)
    if reason is not None:
        raise InputError(f"{source} cannot be set: {reason}")
    if isinstance(value, str | int | float):
        try:
            read = getattr(_parser().parse_args([f"--{name}={value}"]), name)
        except ArgumentError as error:  # its text names a flag that is not ours
            raise InputError(f"{source}: {error.message}") from error
        # `fsdp` is a text or a bool.
        return value if isinstance(value, bool) and isinstance(read, str) else read
    kind = "None" if value is None else type(value).__name__
    if kind not in str(get_type_hints(TrainingArguments)[name]):
        raise InputError(f"{source} must be {_hint(name)}, got {value!r:.80}")
    return value


@lru_cache
def _parser() -> HfArgumentParser:
    return HfArgumentParser(TrainingArguments, allow_abbrev=False, exit_on_error=False)


def _hint(name: str) -> str:
    kind = get_type_hints(TrainingArguments)[name]
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _reports(text: str) -> str | list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    return names[0] if len(names) == 1 else names


def _set(pairs: Sequence[str], steps: str) -> dict[str, object]:
    """Read NAME=VALUE of ``--set``; a value is a scalar, a list or a mapping of YAML."""
    fields: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"--set takes NAME=VALUE, got {pair!r}")
        name = name.strip().replace("-", "_")
        with reading(name, "--set"):
            value = yaml.safe_load(text)
        known = known_name(name)
        if known in fields:
            raise InputError(f"--set {name} stands twice")
        fields[known] = typed(name, value, f"--set {name}", steps)
    return fields

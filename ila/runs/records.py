"""Read JSON files of a run and check every field; an error names the file and the field."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """Expected value of a field, in words, and a test for it."""

    expected: str
    is_valid: Callable[[object], bool]


def read_record(file: Path, fields: Mapping[str, Field], absent: str = "") -> dict[str, Any]:
    """Read an object and check its fields; it may have others.

    Args:
        file: JSON file.
        fields: Name -> expected value.
        absent: Hint for the error about a missing file.

    Raises:
        ValueError: The file is missing, is not JSON, lacks fields, or holds values of the wrong
            type.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file{absent}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON, or cut short: {error}") from None
    check_record(record, fields, file)
    return record


def check_record(record: object, fields: Mapping[str, Field], where: object) -> None:
    """Raise unless an object has these fields.

    >>> check_record({"steps": -1}, {"steps": COUNT}, "metrics.json")
    Traceback (most recent call last):
    ValueError: metrics.json: steps must be an integer of 0 or more, got -1
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: must hold an object, got {type(record).__name__}")
    missing = [key for key in fields if key not in record]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    for key, (expected, is_valid) in fields.items():
        if not is_valid(record[key]):
            raise ValueError(f"{where}: {key} must be {expected}, got {record[key]!r:.80}")


def or_null(field: Field) -> Field:
    """Return a field that also accepts null."""
    return Field(f"{field.expected} or null", lambda value: value is None or field.is_valid(value))


def numbers_by_name(value: object) -> bool:
    """Tell whether a value is an object of finite numbers."""
    return isinstance(value, Mapping) and all(is_number(number) for number in value.values())


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number and not a bool."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def is_count(value: object) -> bool:
    """Tell whether a value is an integer of 0 or more that 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


TEXT = Field("a text", lambda value: isinstance(value, str))
COUNT = Field("an integer of 0 or more", is_count)
SIZE = Field("an integer in [1, 2³¹)", lambda value: is_count(value) and 1 <= value < 2**31)
NUMBER = Field("a finite number", is_number)
RATE = Field("a finite number of 0 or more", lambda value: is_number(value) and value >= 0)
NUMBERS = Field("an object of finite numbers", numbers_by_name)
OBJECT = Field("an object", lambda value: isinstance(value, Mapping))

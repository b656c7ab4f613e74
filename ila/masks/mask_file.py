"""Read and write a mask file: JSON of one format and version, every field checked."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from ila.masks.checks import type_name
from ila.runs.atomic import write_json_atomic

FORMAT = "ila.layer_mask"
VERSION = 1


class Fields(TypedDict):
    """Arguments of ``LayerMask`` as a file holds them; the mask checks their values."""

    scores: dict[str, Any]
    gates: dict[str, Any]
    provenance: Any


def read_fields(file: Path) -> Fields:
    """Read the arguments of a mask from its file.

    Raises:
        FileNotFoundError: The file is missing.
        json.JSONDecodeError: The file is not JSON, or cut short.
        ValueError: The file is JSON, but not a mask of this version.
    """
    document = json.loads(
        file.read_bytes().decode("utf-8"),
        object_pairs_hook=_without_duplicates,
        parse_constant=_refuse_constant,
    )
    return _fields_of(document)


def write_fields(
    file: Path,
    scores: Mapping[str, float],
    gates: Mapping[str, bool],
    provenance: Mapping[str, object],
) -> None:
    """Write a mask file; a failure leaves the old file."""
    modules = {name: {"score": s, "open": gates[name]} for name, s in scores.items()}
    document = {"format": FORMAT, "version": VERSION, "modules": modules}
    write_json_atomic(file, {**document, "provenance": provenance})


def _fields_of(document: object) -> Fields:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'expected an object with "format": "{FORMAT}"')
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"expected version {VERSION}, got {version!r}")
    _check_keys(document, {"format", "version", "modules", "provenance"}, "the file")
    if not isinstance(document["modules"], dict):
        raise ValueError(f"modules must be an object, got {type_name(document['modules'])}")
    for name, entry in document["modules"].items():
        _check_keys(entry, {"score", "open"}, f"modules[{name!r}]")
    return {
        "scores": {name: entry["score"] for name, entry in document["modules"].items()},
        "gates": {name: entry["open"] for name, entry in document["modules"].items()},
        "provenance": document["provenance"],
    }


def _check_keys(entry: object, expected: set[str], place: str) -> None:
    if not isinstance(entry, dict) or set(entry) != expected:
        got = sorted(entry) if isinstance(entry, dict) else type_name(entry)
        raise ValueError(f"{place} must be an object with the fields {sorted(expected)}, got {got}")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries: dict[str, object] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"{key!r} appears twice in one object")
        entries[key] = value
    return entries


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is not a JSON number")


def file_of(path: str | os.PathLike[str]) -> Path:
    """Return the file itself, or ``mask.json`` in a folder."""
    return Path(path) / "mask.json" if Path(path).is_dir() else Path(path)

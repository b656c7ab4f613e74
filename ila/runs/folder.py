"""Ownership of an output folder: a marker file in it describes the run that writes there.

The marker is the first file of a run. A run that finds another marker, or a folder with other
files, changes nothing and raises. To resume, the descriptions must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ila.runs.atomic import write_json_atomic
from ila.runs.lock import LEFT_OVER, LOCK_FILE

RUN_MARKER = "run.json"  # a command writes it; a search or a training adds its own marker
CONFIG = "config.yaml"  # the options of a command, written after its marker


def check(
    folder: Path,
    description: Mapping[str, object],
    *,
    marker: str,
    resume: bool,
    beside: Collection[str] = (),
    remedy: str = "give another folder",
) -> bool:
    """Raise unless a folder is free, or holds the described run and ``resume`` is true.

    Args:
        folder: Output folder; it need not exist.
        description: Entries that the marker must hold too, JSON-able; it may hold more.
        marker: Name of the marker file.
        resume: Whether to go on with a run that is there.
        beside: Names of files of other writers, which may be in the folder.
        remedy: Advice to the user, for the errors.

    Returns:
        Whether the folder holds the run.

    Raises:
        ValueError: If the folder holds another run, a run although ``resume`` is false, or files
            that belong to no run.
    """
    if (folder / marker).exists():
        theirs = read(folder, marker)
        mine = json.loads(json.dumps(description))
        if not resume:
            raise ValueError(
                f"folder {folder} holds a run already; {remedy}, or go on with that "
                "one (--resume; in Python resume=True)"
            )
        differs = differences(theirs, mine)
        if differs:
            raise ValueError(
                f"folder {folder} holds a run that differs in {', '.join(differs)}; {remedy}"
            )
        return True
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        ours = {LOCK_FILE, *beside, *((CONFIG,) if RUN_MARKER in beside else ())}
        if any(name not in ours and not LEFT_OVER.fullmatch(name) for name in names):
            raise ValueError(
                f"folder {folder} is not the folder of a run and was left alone; {remedy}"
            )
    return False


def claim(
    folder: Path,
    description: Mapping[str, object],
    *,
    marker: str,
    resume: bool,
    also: Mapping[str, object] | None = None,
    beside: Collection[str] = (),
    remedy: str = "give another folder",
) -> None:
    """Claim a folder for this run, or check that it belongs to it; call this on one process only.

    Args:
        folder: Output folder; made if it does not exist.
        description: See ``check``.
        marker: Name of the marker file.
        resume: Whether to go on with a run that is there.
        also: Further entries of the marker; they may differ when a run resumes.
        beside: See ``check``.
        remedy: See ``check``.

    Raises:
        ValueError: See ``check``.
    """
    if not check(folder, description, marker=marker, resume=resume, beside=beside, remedy=remedy):
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / marker, {**description, **(also or {})})


def read(folder: Path, marker: str) -> dict[str, Any]:
    """Return the content of a marker.

    Raises:
        FileNotFoundError: If the folder has no marker.
        ValueError: If the marker is damaged.
    """
    file = folder / marker
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {marker}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); give another folder") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, got {type(content).__name__}")
    return content


def differences(theirs: Mapping[str, object], mine: Mapping[str, object]) -> list[str]:
    """Name the entries of ``mine`` that differ in ``theirs``; a dot stands before a field.

    >>> differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 3})
    ['a.c']
    """
    names = []
    for key, new in mine.items():
        old = theirs.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{key}.{k}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        elif old != new:
            names.append(key)
    return names

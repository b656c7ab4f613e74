"""Who owns an output folder: a marker file in it describes the run that writes there.

The marker is the first file of a run. A run that finds another's marker, or a folder that holds
something else, changes nothing and says why; resuming asks for the same description.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ila.runs.atomic import write_json_atomic
from ila.runs.lock import LEFT_OVER, LOCK_FILE

RUN_MARKER = "run.json"  # of a command; a search or a training has its own beside it


def check(
    folder: Path,
    description: Mapping[str, Any],
    *,
    marker: str,
    resume: bool,
    beside: Collection[str] = (),
    remedy: str = "give another folder",
) -> bool:
    """Raise unless a folder is free, or holds the run described and may be resumed.

    Args:
        folder: Output folder; it need not exist.
        description: What must be the same in the marker, JSON-able; the marker may say more.
        marker: Name of the marker file.
        resume: Whether to go on with a run that is there.
        beside: Names of files that others may have put into the folder before.
        remedy: What the user can do, for the errors.

    Returns:
        Whether the run is there.

    Raises:
        ValueError: If the folder holds another run, one that was not to be resumed, or what is no
            run at all.
    """
    if (folder / marker).exists():
        found = read(folder, marker)
        mine = json.loads(json.dumps(description))
        if not resume:
            raise ValueError(
                f"folder {folder} holds a run already; {remedy}, or go on with that "
                "one (--resume; in Python resume=True)"
            )
        differs = differences(found, mine)
        if differs:
            raise ValueError(
                f"folder {folder} holds a run that differs in {', '.join(differs)}; {remedy}"
            )
        return True
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        ours = {LOCK_FILE, *beside}
        if any(name not in ours and not LEFT_OVER.fullmatch(name) for name in names):
            raise ValueError(
                f"folder {folder} is not the folder of a run and was left alone; {remedy}"
            )
    return False


def claim(
    folder: Path,
    description: Mapping[str, Any],
    *,
    marker: str,
    resume: bool,
    also: Mapping[str, Any] | None = None,
    beside: Collection[str] = (),
    remedy: str = "give another folder",
) -> None:
    """Make a folder this run's, or check that it is; of several processes, one does this.

    Args:
        folder: Output folder; made if it does not exist.
        description: See ``check``.
        marker: Name of the marker file.
        resume: Whether to go on with a run that is there.
        also: What the marker says beside the description, and what may differ.
        beside: See ``check``.
        remedy: See ``check``.

    Raises:
        ValueError: See ``check``.
    """
    if not check(folder, description, marker=marker, resume=resume, beside=beside, remedy=remedy):
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / marker, {**description, **(also or {})})


def read(folder: Path, marker: str) -> dict[str, Any]:
    """Return what a marker says.

    Raises:
        FileNotFoundError: If there is no marker.
        ValueError: If it is damaged.
    """
    file = folder / marker
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {marker}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); give another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object, got {type(found).__name__}")
    return found


def differences(found: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Return the names in ``mine`` that ``found`` has otherwise, with a dot before a field.

    >>> differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 3})
    ['a.c']
    """
    names = []
    for key, new in mine.items():
        old = found.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{key}.{k}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        elif old != new:
            names.append(key)
    return names

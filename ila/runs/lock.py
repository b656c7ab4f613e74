"""Give a folder one owner at a time: a run holds its lock while it writes there.

The lock file lies in the folder and disappears with the run. The system releases a lock when its
process dies in any way, so that the left-overs of a killed run do not block the next.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".ila-lock"
# Killed writers leave these names; see ``ila.runs.atomic`` and ``ila.training.train``.
LEFT_OVER = re.compile(r"\.ila-tmp-[0-9a-f]+|\.adapter-\w+|.+\.replaced-[0-9a-f]{8}")
# Folders that a thread of this process owns: a search inside a command's run owns nothing new.
_owned: dict[tuple[str, int], FileLock] = {}


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder while the block runs; blocks of one thread may be nested.

    The block makes a missing folder, and removes it again if it stays empty. At its end it removes
    the left-overs of killed writers.

    Args:
        folder: Output folder.

    Raises:
        ValueError: If another process or thread owns it, or it is a file.
    """
    key = (os.path.realpath(folder), threading.get_ident())
    if key in _owned:
        yield
        return
    made = _make(folder)
    try:
        lock = _lock(folder)
    except BaseException:
        _remove_empty(made)
        raise
    _owned[key] = lock
    try:
        yield
        sweep(folder)
    finally:
        del _owned[key]
        # Before the release: a process that opened this file will find another one, or no file.
        with suppress(OSError):
            (folder / LOCK_FILE).unlink()
        lock.release()
        _remove_empty(made)


def sweep(folder: Path) -> None:
    """Remove the left-overs of killed writers from a folder that this process owns."""
    for path in list(folder.rglob("*")):
        if LEFT_OVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _lock(folder: Path) -> FileLock:
    """Take the lock of a folder, or raise at once."""
    file = folder / LOCK_FILE
    while True:
        lock = FileLock(file, timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)  # another owner may have removed it again
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"folder {folder} is being written by another process; wait for it, or give "
                "another folder"
            ) from None
        except FileNotFoundError:
            continue
        if _is_at(file, lock):
            return lock
        lock.release()  # its owner removed the file while we waited


def _is_at(file: Path, lock: FileLock) -> bool:
    """Tell whether the locked file still lies at its place."""
    try:
        present = os.stat(file)
    except FileNotFoundError:
        return False
    held = lock._context.lock_file_fd
    return held is not None and os.path.samestat(present, os.fstat(held))


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents; return the new ones, the innermost first."""
    made = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        made.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _remove_empty(made: list[Path]) -> None:
    for path in made:
        with suppress(OSError):
            path.rmdir()

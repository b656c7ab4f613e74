"""One owner of a folder at a time: a lock that is held while a run writes there.

The lock file lies in the folder and goes with the run. The system gives a lock back when its
process dies, however it dies, so that what a killed run leaves does not keep out the next.
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
# Of writers that were killed; see ``ila.runs.atomic`` and ``ila.training.train``.
LEFT_OVER = re.compile(r"\.ila-tmp-[0-9a-f]+|\.adapter-\w+|.+\.replaced-[0-9a-f]{8}")
# Folders that a thread of this process owns: a search inside a command's run owns nothing new.
_owned: dict[tuple[str, int], FileLock] = {}


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder while the block runs; blocks of one thread may be nested.

    The folder is made if it does not exist, and removed again if nothing was put into it. What
    writers that were killed have left there is removed on leaving.

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
        # While it is held: whoever opened the old file sees that another lies there, or none.
        with suppress(OSError):
            (folder / LOCK_FILE).unlink()
        lock.release()
        _remove_empty(made)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder that this process owns."""
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
        lock.release()  # of a file that its owner removed while we waited for it


def _is_at(file: Path, lock: FileLock) -> bool:
    """Whether what was locked is the file that lies there now."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return False
    held = lock._context.lock_file_fd
    return held is not None and os.path.samestat(found, os.fstat(held))


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; return what was made, the innermost first."""
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

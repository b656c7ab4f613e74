"""Files and folders that appear whole or not at all.

A mask or an adapter takes hours to make, and disks fill up and jobs are killed while it is saved.
Every function here writes beside the destination, flushes to the disk, and then renames into place:
a reader sees the old content or the new one, never a part of either.
"""

import contextlib
import json
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``; a failure leaves the old content.

    Args:
        path: File to create or to overwrite. Its folder must exist. The function follows a
            symbolic link and keeps the permissions of a file that it overwrites.
        data: Content.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: The write failed, for example because the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes_atomic(f"{folder}/a.bin", b"12")
    ...     Path(f"{folder}/a.bin").read_bytes()
    b'12'
    """
    target = _target(path)
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file, got the folder {target}")
    temporary = _temporary_name(target)
    # Not tempfile: only the owner can read its files, under any umask.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, line ends as given; see ``write_bytes_atomic``.

    Args:
        path: File to create or to overwrite. Its folder must exist.
        text: Content.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
        ValueError: ``text`` cannot be written as UTF-8 (it holds a lone surrogate).
        OSError: The write failed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text_atomic(f"{folder}/a.txt", "28 °C")
    ...     Path(f"{folder}/a.txt").read_text(encoding="utf-8")
    '28 °C'
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike[str], obj: object) -> None:
    """Write ``obj`` to ``path`` as indented ASCII JSON without NaN; see ``write_bytes_atomic``.

    Args:
        path: File to create or to overwrite. Its folder must exist.
        obj: A value that the ``json`` module can write.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
        TypeError: ``obj`` holds a value that JSON cannot express.
        ValueError: ``obj`` holds NaN or an infinity, which are not JSON.
        OSError: The write failed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json_atomic(f"{folder}/a.json", {"steps": 3})
    ...     json.loads(Path(f"{folder}/a.json").read_bytes())
    {'steps': 3}
    """
    write_text_atomic(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def write_folder_atomic(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes ``path`` when the ``with`` block ends without error.

    An error removes the new folder and leaves ``path`` unchanged. An old folder is first renamed to
    ``<name>.replaced-<random>`` beside ``path`` and removed last: a process killed at any point
    leaves the old folder, the new one, or both.

    Args:
        path: Folder to make. Its parent must exist.
        replace: Whether to replace a folder that is already at ``path``.

    Yields:
        The temporary folder, beside ``path`` (thus on the same disk).

    Raises:
        FileExistsError: ``path`` exists and ``replace`` is false, or ``path`` is a file. Raised
            before anything is written.
        FileNotFoundError: The parent of ``path`` does not exist.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_folder_atomic(f"{folder}/run") as temporary:
    ...         _ = (temporary / "a.txt").write_text("a")
    ...     [file.name for file in Path(f"{folder}/run").iterdir()]
    ['a.txt']
    """
    target = _target(path)
    _check_free(target, replace)
    temporary = _temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        _check_free(target, replace)  # again: the block may have run for hours
        _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Flush every file below a folder, their names and the folder's own name, to the disk.

    Call it for files of another library before a marker says that they are complete.

    Args:
        folder: An existing folder; symbolic links in it are not followed.

    Raises:
        OSError: The write failed.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file.is_file() and not file.is_symlink():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        _sync_folder(Path(root))
    _sync_folder(Path(os.path.abspath(folder)).parent)


def move_in(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Move every file of one folder into another on the same disk; each file moves whole.

    Args:
        source: Folder to empty.
        folder: Existing folder; a file of the same name there is replaced.

    Raises:
        OSError: The write failed; if the flush failed, no file was moved.
    """
    sync_tree(source)
    for path in sorted(Path(source).iterdir()):
        path.replace(Path(folder, path.name))
    _sync_folder(Path(folder))


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        _sync_folder(target.parent)
        return
    aside = target.with_name(f"{target.name[:50]}.replaced-{secrets.token_hex(4)}")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    _sync_folder(target.parent)
    try:
        shutil.rmtree(aside)
    except OSError as error:  # a warning only: the new folder is in place
        warnings.warn(f"could not remove the replaced folder {aside}: {error}", stacklevel=4)


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, {target.parent} is none")
    return target


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".ila-tmp-{secrets.token_hex(8)}")


def _check_free(target: Path, replace: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"path must be a folder or free, {target} is a file")
    if not replace:
        raise FileExistsError(
            f"path must not exist, {target} does; pass replace=True to replace it"
        )


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renames are durable
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

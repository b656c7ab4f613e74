"""Where a user's file is read: whatever a library raises there becomes an error of that file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST = 300


@contextmanager
def reading(source: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever is raised inside into one ``ValueError`` that names the source.

    Errors that name the source already pass as they are, and so do missing packages. Keep the block
    to calls of libraries: an error of our own inside it would be blamed on the file.

    Args:
        source: Path or name of what is read.
        kind: What it is to the user, for example ``"data file"``.

    Raises:
        ValueError: ``"{kind} {source}: …"``, with the library's error as its cause.

    >>> with reading("rows.parquet", "source"):
    ...     {}["a"]
    Traceback (most recent call last):
    ValueError: source rows.parquet: KeyError: 'a'
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, ValueError | OSError) and str(source) in str(error):
            raise
        raise ValueError(f"{kind} {source}: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    """Say an error in one line: its text, led by its type unless that is a plain ``ValueError``.

    >>> in_one_line(MemoryError())
    'MemoryError'
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    if type(error) is ValueError and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

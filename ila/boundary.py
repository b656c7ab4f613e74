"""The border between the user's input and our code: which errors are said, and which are bugs.

``reading`` stands where a library reads what the user gave: whatever is raised there becomes one
``InputError`` that names the input. ``described`` tells, for an error that reached the command
line, what to say of it:

- what our own code raised on purpose (a ``raise`` of ours, or of ``reading``) is its message;
- what the machine refused (a full disk, no memory, a folder that may not be written) is said so;
- anything else is a bug of ours, and keeps its traceback.

So a new kind of error in a library needs no new line anywhere.
"""

from __future__ import annotations

import dis
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

HOME = Path(__file__).resolve().parent
_OURS = (str(HOME), str(HOME.parent / "ila_kernels"))
_LONGEST = 600
_RAISE = dis.opmap["RAISE_VARARGS"]
# A panic of a library in Rust is no Exception; these are none of an input's doing.
_NOT_OF_INPUT = (KeyboardInterrupt, SystemExit, GeneratorExit, ImportError)


class InputError(ValueError):
    """What the user gave cannot be used; the message names it and says why."""


@contextmanager
def reading(source: object, kind: str) -> Iterator[None]:
    """Turn whatever is raised inside into one ``InputError`` that names the source.

    Errors that our own code raises on purpose pass as they are, and so do missing packages and what
    the machine refuses. Keep the block to calls of libraries: an error of our own inside it that
    comes up in a library would be blamed on the input.

    Args:
        source: Path or name of what is read.
        kind: What it is to the user, for example ``"data file"``.

    Raises:
        InputError: ``"{kind} {source}: …"``, with the library's error as its cause.

    >>> with reading("rows.parquet", "source"):
    ...     int("a")
    Traceback (most recent call last):
    ila.boundary.InputError: source rows.parquet: invalid literal for int() with base 10: 'a'
    """
    try:
        yield
    except _NOT_OF_INPUT:
        raise
    except BaseException as error:
        is_library_error = isinstance(error, Exception) or _is_panic(error)
        if not is_library_error or not _is_of_the_input(error):
            raise
        raise InputError(f"{kind} {source}: {in_one_line(error)}") from error


@contextmanager
def writing(target: object) -> Iterator[None]:
    """Turn whatever a library raises while it writes into one ``OSError`` that names the target.

    Raises:
        OSError: ``"{target} could not be written: …"``, with the library's error as its cause.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_input(error):
            raise
        raise OSError(f"{target} could not be written: {in_one_line(error)}") from error


def described(error: BaseException) -> str | None:
    """Return the one line to say of an error, or None if it is a bug of ours."""
    if is_said(error):
        return in_one_line(error, led_by_type=False)
    if isinstance(error, OSError) and error.errno is not None:
        return in_one_line(error, led_by_type=False)
    if is_out_of_memory(error):
        return f"not enough memory: {in_one_line(error)}"
    return None


def is_said(error: BaseException) -> bool:
    """Whether our own code raised an error on purpose: its innermost frame is a ``raise`` of ours.

    >>> try:
    ...     {}["a"]
    ... except KeyError as error:
    ...     is_said(error)
    False
    """
    place = _innermost(error)
    if place is None or isinstance(error, AssertionError) or not _is_ours(place):
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == _RAISE


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, here or on a device."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def in_one_line(error: BaseException, *, led_by_type: bool = True) -> str:
    """Say an error in one line: its text, led by its type unless that is a plain ``ValueError``.

    >>> in_one_line(MemoryError())
    'MemoryError'
    """
    text = " ".join(_printable(str(error)).split())
    if led_by_type:
        # The end may say what to do.
        half = _LONGEST // 2
        text = text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}"
    if text and (not led_by_type or type(error) in (ValueError, InputError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def bug_report(error: BaseException) -> str:
    """Return the traceback of a bug, and where to report it."""
    lines = "".join(traceback.format_exception(error))
    return _printable(
        f"{lines}This is a bug of ila, not of your input: please report it to the authors of "
        "ila-kernels, with these lines and the command"
    )


def _is_of_the_input(error: BaseException) -> bool:
    """Whether a library raised an error in a block: neither our ``raise`` nor a slip of ours."""
    if is_said(error):
        return False
    # The first entry is the context manager's own, the second that of the block, in which calls of
    # libraries in C leave no entry.
    block, place = error.__traceback__.tb_next, _innermost(error)
    return place is block or place is None or not _is_ours(place)


def _printable(text: str) -> str:
    """Return text that any terminal takes: no half characters, no control characters."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c in "\n\t " else " " for c in whole)


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _is_ours(place: TracebackType) -> bool:
    return place.tb_frame.f_code.co_filename.startswith(_OURS)


def _innermost(error: BaseException) -> TracebackType | None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place

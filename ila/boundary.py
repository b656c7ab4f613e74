"""The border between the user's input and our code: tell errors of the input from bugs of ours.

``reading`` stands where a library reads input of the user: it turns any error there into one
``InputError`` that names the input. ``described`` returns the line to print for an error that
reached the command line:

- our own code raised it on purpose (a ``raise`` of ours, or of ``reading``): its message;
- the machine refused (a full disk, no memory, a folder without permission): the refusal;
- anything else is a bug of ours, and keeps its traceback.

A new kind of error in a library thus needs no new code.
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
# A panic of a library in Rust is no Exception. An input does not cause these.
_NOT_OF_INPUT = (KeyboardInterrupt, SystemExit, GeneratorExit, ImportError)


class InputError(ValueError):
    """Input of the user that cannot be used; the message names it and gives the reason."""


@contextmanager
def reading(source: object, kind: str) -> Iterator[None]:
    """Turn any error inside into one ``InputError`` that names the source.

    Errors that our own code raises on purpose pass unchanged, and so do missing packages and
    refusals of the machine. Keep the block to calls of libraries: a bug of ours that shows in a
    library inside the block would be blamed on the input.

    Args:
        source: Path or name of the input.
        kind: Name of the input for the user, for example ``"data file"``.

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
    """Turn any error of a library that writes into one ``OSError`` that names the target.

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
    """Tell whether our own code raised an error on purpose, in its innermost frame.

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
    """Tell whether there was no memory left, here or on a device."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def in_one_line(error: BaseException, *, led_by_type: bool = True) -> str:
    """Say an error in one line: its text, led by its type unless that is a plain ``ValueError``.

    >>> in_one_line(MemoryError())
    'MemoryError'
    """
    text = " ".join(_printable(str(error)).split())
    if led_by_type:
        # The end may hold the remedy.
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
    """Tell whether a library raised an error in a block, and not our code."""
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

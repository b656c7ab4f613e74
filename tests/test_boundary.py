"""Which errors are said and which are bugs: by where they were raised, not by their type."""

import errno
import json

import pytest

from ila.boundary import InputError, bug_report, described, in_one_line, reading, writing
from ila.data.rows import split_indices
from ila.masks.checks import number
from ila.masks.names import parse_module_name
from ila.runs.atomic import write_text_atomic


class PanicException(BaseException):
    """What a library in Rust raises when it panics, by its name."""


def caught(call, *arguments):
    try:
        call(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("no error")


@pytest.mark.parametrize(
    "error",
    [
        *(KeyError("a"), IndexError("5"), TypeError("x"), RuntimeError("r"), MemoryError()),
        *(Exception(), RecursionError("deep"), OSError("no number"), UnicodeError("u")),
        PanicException("panicked"),
    ],
)
def test_whatever_a_library_raises_names_what_was_read(error):
    def library():
        raise error

    with pytest.raises(InputError) as found, reading("dir/file.x", "speed file"):
        library()
    assert str(found.value).startswith("speed file dir/file.x: ")
    assert found.value.__cause__ is error and described(found.value) == str(found.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(2), ImportError("need x")])
def test_what_is_not_of_the_input_passes(error):
    with pytest.raises(type(error)) as found, reading("a", "b"):
        raise error
    assert found.value is error


def test_a_message_of_ours_passes_a_block_and_is_said():
    with pytest.raises(ValueError, match=r"held_out must be a fraction in \(0, 1\)") as found:
        with reading("rows.jsonl", "data"):
            split_indices(5, 3.0, 0)
    assert not isinstance(found.value, InputError)
    assert described(found.value) == str(found.value)


def test_a_slip_of_ours_is_a_bug_inside_a_block_and_outside():
    error = caught(parse_module_name, 5)  # AttributeError in a frame of ours
    assert described(error) is None and "please report it" in bug_report(error)
    with pytest.raises(AttributeError), reading("mask.json", "mask"):
        parse_module_name(5)


def test_an_error_of_a_library_without_a_block_is_a_bug():
    assert described(caught(json.loads, "{")) is None


def test_a_library_in_c_that_the_block_calls_is_a_library():
    with pytest.raises(InputError, match="number file a: "), reading("a", "number file"):
        int("x")


def test_what_the_machine_refuses_is_said(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
    assert "No space left" in described(full)
    assert str(tmp_path) in described(caught(write_text_atomic, tmp_path, "a"))
    assert described(MemoryError("too much")) == "not enough memory: MemoryError: too much"


def test_what_cannot_be_written_names_its_place():
    def save():
        raise RuntimeError("PytorchStreamWriter failed")

    with pytest.raises(OSError, match=r"^out could not be written: RuntimeError: Pyt") as found:
        with writing("out"):
            save()
    assert described(found.value) == str(found.value)


def test_a_line_is_one_line_that_any_terminal_takes():
    error = caught(number, "a\nb\x1b[31m\udcff", "x" * 5 + "\r\n")
    assert "\n" not in described(error) and "\x1b" not in described(error)
    long = in_one_line(RuntimeError("begin" + "x" * 5000 + "the end"))
    assert len(long) < 700 and "begin" in long and long.endswith("the end")

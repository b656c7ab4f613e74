"""Laws of the atomic writers: whole or not at all, and the old content survives every failure."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ila.runs.atomic import (
    move_in,
    write_bytes_atomic,
    write_folder_atomic,
    write_json_atomic,
    write_text_atomic,
)


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(*_):
    raise KeyboardInterrupt


WRITERS = {
    "bytes": lambda path: write_bytes_atomic(path, b"new"),
    "text": lambda path: write_text_atomic(path, "new"),
    "json": lambda path: write_json_atomic(path, {"new": True}),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [disk_full, interrupted])
def test_failure_keeps_the_old_file_and_leaves_nothing(
    tmp_path, monkeypatch, writer, call, failure
):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    monkeypatch.setattr(os, call, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        WRITERS[writer](file)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_is_really_full_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    fdopen = os.fdopen

    def fdopen_full(descriptor, mode):
        os.close(descriptor)
        return fdopen(os.open("/dev/full", os.O_WRONLY), mode)

    monkeypatch.setattr(os, "fdopen", fdopen_full)
    with pytest.raises(OSError) as caught:
        write_bytes_atomic(file, b"new" * 100_000)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("obj", [float("nan"), [float("inf")], {"a": {1, 2}}, object()])
def test_what_json_cannot_hold_touches_nothing(tmp_path, obj):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises((TypeError, ValueError)):
        write_json_atomic(file, obj)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("text", ["", "é\n", "a\r\nb\rc", "\x00", "漢字 😀"])
def test_text_comes_back_byte_for_byte(tmp_path, text):
    write_text_atomic(tmp_path / "a", text)
    assert (tmp_path / "a").read_bytes() == text.encode()


def test_json_keeps_order_and_lone_surrogates(tmp_path):
    obj = {"b": "\ud800", "a": [1, None, 0.1]}
    write_json_atomic(tmp_path / "a", obj)
    loaded = json.loads((tmp_path / "a").read_bytes())
    assert loaded == obj and list(loaded) == ["b", "a"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_the_umask_for_new_files_and_kept_for_old_ones(tmp_path):
    file = tmp_path / "a"
    mask = os.umask(0o022)
    try:
        write_text_atomic(file, "1")
        assert file.stat().st_mode & 0o777 == 0o644
        file.chmod(0o640)
        write_text_atomic(file, "2")
        assert file.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


def test_a_symbolic_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_missing_folder_and_folder_as_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        write_text_atomic(tmp_path / "absent" / "a", "")
    with (
        pytest.raises(FileNotFoundError, match="absent"),
        write_folder_atomic(tmp_path / "absent/a"),
    ):
        raise AssertionError("must not be entered")
    with pytest.raises(IsADirectoryError, match="must be a file"):
        write_text_atomic(tmp_path, "")
    assert os.listdir(tmp_path) == []


def tree(folder):
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def test_folder_appears_only_when_the_block_ends(tmp_path):
    with write_folder_atomic(tmp_path / "run") as folder:
        assert folder.parent == tmp_path
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("1")
        assert not (tmp_path / "run").exists()
    assert tree(tmp_path) == {"run/deep/a": "1"}


def test_existing_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(FileExistsError, match="replace=True"),
        write_folder_atomic(tmp_path / "run"),
    ):
        raise AssertionError("must not be entered")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_is_never_replaced_by_a_folder(tmp_path, replace):
    (tmp_path / "run").write_text("file")
    with (
        pytest.raises(FileExistsError, match="is a file"),
        write_folder_atomic(tmp_path / "run", replace=replace),
    ):
        raise AssertionError("must not be entered")
    assert tree(tmp_path) == {"run": "file"}


def test_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError), write_folder_atomic(tmp_path / "run") as folder:
        (folder / "a").write_text("mine")
        (tmp_path / "run").mkdir()  # empty: a bare rename would replace it silently
    assert tree(tmp_path) == {} and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("failure", [disk_full, interrupted])
def test_failing_block_leaves_the_old_folder(tmp_path, failure):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    with (
        pytest.raises((OSError, KeyboardInterrupt)),
        write_folder_atomic(tmp_path / "run", replace=True) as folder,
    ):
        (folder / "a").write_text("new")
        failure()
    assert tree(tmp_path) == {"run/a": "old"} and os.listdir(tmp_path) == ["run"]


def test_replaced_folder_holds_nothing_of_the_old_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with write_folder_atomic(tmp_path / "run", replace=True) as folder:
        (folder / "new").write_text("new")
        assert tree(tmp_path / "run") == {"old": "old"}
    assert tree(tmp_path) == {"run/new": "new"} and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("nth", [1, 2])
def test_failing_rename_restores_the_old_folder(tmp_path, monkeypatch, nth):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    rename, calls = os.rename, []

    def flaky(source, destination):
        calls.append(source)
        if len(calls) == nth:
            disk_full()
        rename(source, destination)

    monkeypatch.setattr(os, "rename", flaky)
    with pytest.raises(OSError), write_folder_atomic(tmp_path / "run", replace=True) as folder:
        (folder / "a").write_text("new")
    assert tree(tmp_path) == {"run/a": "old"} and os.listdir(tmp_path) == ["run"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_killed_while_replacing_loses_nothing(tmp_path, renames):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    code = f"""
        import os, shutil, signal
        from ila.runs.atomic import write_folder_atomic
        rename, calls = os.rename, []
        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)
        def counted(source, destination):
            if len(calls) == {renames}:
                die()
            calls.append(source)
            rename(source, destination)
        os.rename, shutil.rmtree = counted, die
        with write_folder_atomic({str(tmp_path / "run")!r}, replace=True) as folder:
            (folder / "a").write_text("new")
    """
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert set(tree(tmp_path).values()) == {"old", "new"}
    present = {0: "old", 1: None, 2: "new"}[renames]
    assert tree(tmp_path / "run") == ({} if present is None else {"a": present})
    if renames:
        assert [tree(p) for p in tmp_path.glob("run.replaced-*")] == [{"a": "old"}]


def test_replaced_folder_that_cannot_be_removed_is_a_warning_not_a_failure(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("shutil.rmtree", disk_full)
    with (
        pytest.warns(UserWarning, match="could not remove the replaced folder"),
        write_folder_atomic(tmp_path / "run", replace=True) as folder,
    ):
        (folder / "a").write_text("new")
    assert tree(tmp_path / "run") == {"a": "new"}


def test_move_in_leaves_everything_where_it_was_if_the_disk_is_full(tmp_path, monkeypatch):
    source, folder = tmp_path / "source", tmp_path / "folder"
    for path in (source, folder):
        path.mkdir()
        (path / "a.txt").write_text(path.name)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            move_in(source, folder)
    assert (source / "a.txt").exists() and (folder / "a.txt").read_text() == "folder"
    move_in(source, folder)
    assert not list(source.iterdir()) and (folder / "a.txt").read_text() == "source"

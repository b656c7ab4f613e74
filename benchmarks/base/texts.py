"""What the small Llama reads, and a data set that it does not: docstrings of the standard library.

The modules of the running Python's standard library fall into two halves by the hash of their name:
one half is read as text, the functions of the other are the rows of the data set.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ila.data.rows import load_rows

STORIES = "text/tinystories_2mib.txt"
BETWEEN = "<|endoftext|>"
INSTRUCT = (
    "instruct/gsm8k_train.jsonl",
    "instruct/gpteacher_roleplay.json",
    "instruct/gpteacher_toolformer_0.6.json",
)
QUESTION = "Write the docstring of this Python function."
_NOT_READ = {"test", "tests", "site-packages", "lib2to3", "idlelib", "turtledemo", "__pycache__"}
_LONGEST = 400  # characters of a function that are shown, and of a docstring that is wanted


def texts(folder: Path) -> list[str]:
    """Return what is read: stories, rows of three instruction sets, half of the standard library.

    Args:
        folder: Holds ``STORIES`` and ``INSTRUCT``.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    stories = (folder / STORIES).read_text(encoding="utf-8").split(BETWEEN)
    rows = [_as_text(row) for name in INSTRUCT for row in load_rows(str(folder / name))]
    return [text.strip() for text in (*stories, *rows, *_sources(read=True)) if text.strip()]


def docstring_rows() -> list[dict[str, str]]:
    """Return rows with ``instruction``, ``input`` (a function) and ``output`` (its docstring)."""
    rows = {}
    for source in _sources(read=False):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                said = (ast.get_docstring(node) or "").split("\n\n")[0]
                code = _without_docstring(node)
                if 20 <= len(said) <= _LONGEST and len(code) >= 40 and said not in code:
                    rows[code[:_LONGEST]] = said
    return [{"instruction": QUESTION, "input": code, "output": rows[code]} for code in rows]


def _as_text(row: dict[str, object]) -> str:
    """Return the values of a row, one below the other."""
    return "\n".join(str(value) for value in row.values() if value)


def _sources(*, read: bool) -> Iterator[str]:
    """Yield the sources of one half of the standard library, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        half = hashlib.sha256(name.as_posix().encode()).digest()[0] % 2 == 0
        if half == read and not _NOT_READ & set(name.parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the code of a function, comments and docstring left out."""
    node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(node)

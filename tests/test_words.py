"""House rules on words and sizes: plain English, few `Any`, short functions, small files.

All tests here read sources only, so `make check` runs them without torch.
"""

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.static

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("ila", "ila_kernels")

# Pattern -> the reason. A sentence has a subject, a verb and an object, in this order.
BANNED = {
    r"\b[Nn]obody\b": "name the subject, or say that there is none",
    r"\b[Ww]ho(m|ever)?\b": "name the subject",
    r"\b[Ww]hat(ever)?\b": "name the thing",
    r"\b[Tt]hose (of|that|which|with)\b": "repeat the noun",
    r"\bhang(s|ing)? on\b": "say 'depends on'",
    r"\bcom(es?|ing) by\b": "say 'happens' or 'passes'",
    r"\b(is|are) none\b": "say 'is not a …' or 'there is no …'",
    r"\bbut for\b": "say 'except for'",
}
# A function does something: its docstring starts with a verb. These words start no verb phrase.
NO_VERBS = set("a all an as each every how if like of or that the those what whether which".split())

# A large part of one thing, or a list; the number of lines is not the difficulty.
LONG_FUNCTIONS = {
    "ila_kernels/kernels/lowrank_gemm.py:_tile": "one Triton kernel: its parts cannot be called",
    "ila_kernels/kernels/lowrank_gemm.py:launch": "one argument of the kernel a line",
}
LONG_FILES = {
    "ila_kernels/config.py": "the tables of tiles, a row for each kernel and target",
}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of docstrings, comments and help texts; quoted code is left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text.partition(">>>")[0]
        elif isinstance(node, ast.keyword) and node.arg == "help":
            yield node.lineno, ast.unparse(node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def banned_words(source: str) -> list[str]:
    """Return one message for each banned phrase in the prose of a file."""
    return [
        f"line {line}: {match[0]!r}: {reason}"
        for line, text in prose(source)
        for pattern, reason in BANNED.items()
        for match in re.finditer(pattern, re.sub(r"`[^`]*`|\s+", " ", text))
    ]


def docstrings_without_verb(source: str) -> list[str]:
    """Return one message for each function whose docstring starts with no verb."""
    wrong = []
    for node in functions(ast.parse(source)):
        is_property = any("property" in ast.unparse(each) for each in node.decorator_list)
        first = (ast.get_docstring(node) or "").split(maxsplit=1)
        if first and not is_property and first[0].lower() in NO_VERBS:
            wrong.append(f"line {node.lineno}: {node.name} starts with {first[0]!r}")
    return wrong


def length_of(node: ast.FunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    docstring = node.body[0] if ast.get_docstring(node) else None
    own = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - own


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_prose_is_plain(path):
    source = path.read_text("utf-8")
    wrong = [*banned_words(source), *docstrings_without_verb(source)]
    assert not wrong, "\n".join(f"{name_of(path)}: {each}" for each in wrong)


@pytest.mark.parametrize(
    "source",
    [
        '"""What a search scores."""',
        '"""Move parameters, so that who refers to them keeps them."""',
        "# Where pre wants no gradient, nobody keeps up.\n",
        "# which columns it spares hangs on the whole batch\n",
        "# fewer than two are none\n",
        'x = Option(help="Rows of a step; those of the search.")',
        'def f():\n    """Hand on the same bits, but for\n    two."""',
    ],
)
def test_a_banned_phrase_is_reported(source):
    assert len(banned_words(source)) == 1


@pytest.mark.parametrize("word", ["Whether", "The", "What", "All"])
def test_a_docstring_without_a_verb_is_reported(word):
    assert docstrings_without_verb(f'def f():\n    """{word} layers."""')
    assert not docstrings_without_verb('def f():\n    """Return layers."""')
    assert not docstrings_without_verb(f'@property\ndef f():\n    """{word} layers."""')


@pytest.mark.parametrize(
    "source",
    [
        '"""Return None if the model is None."""',
        '"""Name the layers whose score is positive."""',
        "x = 'what nobody reads'",
        '"""Count `what` layers.\n\n>>> what is None\n"""',
    ],
)
def test_plain_prose_and_code_are_not_reported(source):
    assert banned_words(source) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_few_values_are_typed_any(package):
    files = [path for path in sources() if path.is_relative_to(REPOSITORY / package)]
    texts = [path.read_text("utf-8") for path in files]
    count = sum(len(re.findall(r"\bAny\b", text)) for text in texts)
    lines = sum(len(text.splitlines()) for text in texts)
    assert count <= 8 * lines / 1000, f"{count} `Any` in {lines} lines"


def test_functions_over_40_lines_have_a_reason():
    lengths = {
        f"{name_of(path)}:{node.name}": length_of(node)
        for path in sources()
        for node in functions(ast.parse(path.read_text("utf-8")))
    }
    long = {name: count for name, count in lengths.items() if count > 40}
    assert set(long) == set(LONG_FUNCTIONS), long
    assert len(LONG_FUNCTIONS) <= 4


def test_files_are_small():
    lines = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in sources()}
    assert {name for name, count in lines.items() if count > 400} == set(LONG_FILES)
    assert statistics.median(lines.values()) <= 150

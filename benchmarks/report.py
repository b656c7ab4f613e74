"""Render README.md, the pages and the figures of docs/ from the files under benchmarks/results/.

    python -m benchmarks.report            write them
    python -m benchmarks.report --check    exit 1 where they and the files disagree

Text stands between two markers in each page; what is outside of them is written by hand. What the
text is, sections say: the modules of ``benchmarks.sections``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks import sections
from benchmarks.sections.stamp import Reading, digest, fault, stamp
from ila.runs.atomic import write_bytes_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PAGES = {
    "benchmarks": "docs/benchmarks.md",
    "study": "docs/study.md",
    "how-it-works": "docs/how-it-works.md",
}
README, FIGURES = "README.md", "docs/figures"
SUFFIXES = (".png", ".svg")
COMMAND = "python -m benchmarks.report"
NOTHING = "Nothing measured yet."
LONG = 12  # lines of a table that a page shows unfolded


class Picture(NamedTuple):
    """How to draw a figure, and the digest of what it is drawn from."""

    draw: Callable[[Path], None]
    results: str


class Results(NamedTuple):
    """The result files: stem -> content, and stem -> digest of the bytes."""

    content: dict[str, Any]
    digests: dict[str, str]


def read_results(folder: Path) -> Results:
    """Read every ``.json`` and ``.jsonl`` (a list of its lines) in a folder."""
    content, digests = {}, {}
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.jsonl"))):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content[path.stem] = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content[path.stem] = json.loads(text)
        digests[path.stem] = digest(text.encode())
    return Results(content, digests)


def find_sections() -> list[ModuleType]:
    """Import every section, in the order in which pages show them."""
    names = [module.name for module in pkgutil.iter_modules(sections.__path__)]
    modules = [importlib.import_module(f"{sections.__name__}.{name}") for name in names]
    shown = [module for module in modules if hasattr(module, "markdown")]
    for module in shown:
        if page_of(module) not in PAGES:
            raise ValueError(f"{module.__name__}: PAGE must be one of {', '.join(PAGES)}")
    return sorted(shown, key=lambda module: (getattr(module, "ORDER", 50), module.__name__))


def page_of(section: ModuleType) -> str:
    return getattr(section, "PAGE", "benchmarks")


def pictures_of(section: ModuleType, results: Results) -> dict[str, Picture]:
    """The figures of a section by file name; none is drawn."""
    if not hasattr(section, "figures"):
        return {}
    reading = Reading(*results)
    draws = section.figures(reading)
    read = reading.close(*sources_of(section))
    return {
        name: Picture(draw, digest(read.encode(), name.encode())) for name, draw in draws.items()
    }


def sources_of(section: ModuleType) -> list[bytes]:
    """The sources of a section and of the modules beside it that are named after it."""
    file = Path(section.__file__)
    beside = sorted(file.parent.glob(f"{file.stem}*.py"))
    return [path.read_text(encoding="utf-8").encode() for path in beside]


def folded(part: str) -> str:
    r"""Fold a long table away behind a line; anything else stays as it is.

    >>> folded("| a |\n| --- |\n| 1 |")
    '| a |\n| --- |\n| 1 |'
    """
    lines = part.splitlines()
    if len(lines) <= LONG or not all(line.startswith("|") for line in lines):
        return part
    return f"<details><summary>Table of {len(lines) - 2} rows</summary>\n\n{part}\n\n</details>"


def section_text(section: ModuleType, content: Mapping[str, Any], pictures: list[str]) -> list[str]:
    """Heading, paragraphs, and the pictures that no paragraph shows."""
    parts = section.markdown(content)
    if not parts:
        return []
    title = getattr(section, "TITLE", None) or section.__doc__.splitlines()[0].rstrip(".")
    shown = "\n".join(parts)
    parts = [folded(part) for part in parts]
    rest = [name for name in pictures if f"](figures/{name})" not in shown]
    says = {name: Path(name).stem.replace("-", " ") for name in rest}
    return [f"## {title}", *parts, *(f"![{says[name]}](figures/{name})" for name in rest)]


def render(results: Results) -> tuple[dict[str, str], dict[str, Picture]]:
    """Page -> what is to stand between its markers, and figure name -> how to draw it."""
    texts: dict[str, list[str]] = {path: [] for path in (README, *PAGES.values())}
    pictures: dict[str, Picture] = {}
    for section in find_sections():
        own = pictures_of(section, results)
        for name in own:
            if name in pictures or Path(name).name != name or Path(name).suffix not in SUFFIXES:
                raise ValueError(f"{section.__name__}: figure {name!r} must be a new .png or .svg")
        pictures |= own
        texts[PAGES[page_of(section)]] += section_text(section, results.content, list(own))
        if hasattr(section, "summary"):
            parts = section.summary(results.content)
            texts[README] += [part.replace("](figures/", f"]({FIGURES}/") for part in parts]
    return {path: "\n\n".join(parts) or NOTHING for path, parts in texts.items()}, pictures


def with_text(page: str, text: str, path: str) -> str:
    """A page with ``text`` between its markers, once each and in their order.

    Raises:
        ValueError: The markers are not there like that.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path} must hold {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def check(root: Path = ROOT) -> list[str]:
    """Say where pages and figures differ from what the results give; nothing is written."""
    texts, pictures = render(read_results(root / "benchmarks/results"))
    wrong = []
    for path, text in texts.items():
        page = (root / path).read_text(encoding="utf-8")
        if (wanted := with_text(page, text, path)) != page:
            wrong.append(f"{path} does not match benchmarks/results: {_difference(page, wanted)}")
    for name, picture in pictures.items():
        file = root / FIGURES / name
        why = fault(file.read_bytes(), picture.results) if file.is_file() else "is missing"
        if why:
            wrong.append(f"{FIGURES}/{name} {why}")
    wrong += [f"{FIGURES}/{name} is drawn by no section" for name in _others(root, pictures)]
    return wrong


def _others(root: Path, pictures: Mapping[str, Picture]) -> list[str]:
    """Pictures that lie among the figures and that nothing draws."""
    folder = root / FIGURES
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f.name for f in files if f.suffix in SUFFIXES and f.name not in pictures]


def _difference(page: str, wanted: str) -> str:
    """The first line that differs."""
    pairs = zip([*page.splitlines(), ""], [*wanted.splitlines(), ""], strict=False)
    is_there, should_be = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    return f"has {is_there[:100]!r}, should have {should_be[:100]!r}"


def write(root: Path = ROOT) -> None:
    """Write the pages, draw every figure anew, remove those that no section draws."""
    texts, pictures = render(read_results(root / "benchmarks/results"))
    for path, text in texts.items():
        page = (root / path).read_text(encoding="utf-8")
        write_text_atomic(root / path, with_text(page, text, path))
    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, picture in pictures.items():
            drawn = Path(folder, name)
            picture.draw(drawn)
            write_bytes_atomic(root / FIGURES / name, stamp(drawn.read_bytes(), picture.results))
    for name in _others(root, pictures):
        (root / FIGURES / name).unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        write()
    elif wrong := check():
        sys.exit("\n".join([*wrong, f"run {COMMAND}"]))


if __name__ == "__main__":
    main()

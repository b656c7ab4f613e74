"""``ila report``: compare finished trainings in a page and a picture."""

from __future__ import annotations

from pathlib import Path

from ila.reports.figures import NOT_DRAWN, can_draw, runs_figure
from ila.reports.tables import runs_markdown
from ila.runs.atomic import write_text_atomic
from ila.runs.metrics import Metrics, load_run

_REPORT_MARK = "<!-- written by `ila report`, which may write it again -->"


def report(runs: list[Path], out: Path) -> list[Metrics]:
    """Compare finished trainings: ``report.md`` and ``report.png`` in ``out``.

    The function replaces an old report.

    Raises:
        FileExistsError: If one of the two files exists and is not a report.
    """
    loaded = [load_run(run) for run in runs]
    page, picture = out / "report.md", out / "report.png"
    ours = page.is_file() and page.read_text("utf-8", "replace").startswith(_REPORT_MARK)
    for file in (page, picture):
        if file.exists() and not ours:
            raise FileExistsError(f"{file} is not of `ila report` and was left alone; move it")
    out.mkdir(parents=True, exist_ok=True)
    # The page first: its mark allows a later report to replace the picture.
    shown = f"![report]({picture.name})" if can_draw() else NOT_DRAWN
    write_text_atomic(page, f"{_REPORT_MARK}\n\n{runs_markdown(loaded)}\n\n{shown}\n")
    if can_draw():
        runs_figure(loaded, picture)
    else:
        picture.unlink(missing_ok=True)  # of an older report
    return loaded

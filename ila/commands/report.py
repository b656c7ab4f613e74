"""What ``ila report`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ila.reports.figures import runs_figure
from ila.reports.tables import runs_markdown
from ila.runs.atomic import write_text_atomic
from ila.runs.metrics import load_run

_REPORT_MARK = "<!-- written by `ila report`, which may write it again -->"


def report(runs: list[Path], out: Path) -> list[dict[str, Any]]:
    """Compare finished trainings: ``report.md`` and ``report.png`` in ``out``.

    A report that is there is written again, so that one can be kept up to date.

    Raises:
        FileExistsError: If a file of one of these names is there that no report made.
    """
    loaded = [load_run(run) for run in runs]
    page, picture = out / "report.md", out / "report.png"
    ours = page.is_file() and page.read_text("utf-8", "replace").startswith(_REPORT_MARK)
    for file in (page, picture):
        if file.exists() and not ours:
            raise FileExistsError(f"{file} is not of `ila report` and was left alone; move it")
    out.mkdir(parents=True, exist_ok=True)
    # The page first: without its mark the picture could not be written again.
    write_text_atomic(
        page, f"{_REPORT_MARK}\n\n{runs_markdown(loaded)}\n\n![report]({picture.name})\n"
    )
    runs_figure(loaded, picture)
    return loaded

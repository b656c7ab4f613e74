"""Write the options of a run, as they were decided, into its folder; ``--config`` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from ila.commands.option_tables import ADAPTER, FIELDS, Given
from ila.runs.atomic import write_text_atomic
from ila.runs.folder import CONFIG
from ila.runs.processes import on_main_process
from ila_kernels._version import __version__

# A folder may move, and knows its own place.
_NEVER = ("out", "config", "set", "resume", *FIELDS)
# `--full` refuses the options of an adapter.
_OF_ADAPTERS = (*(name for name in ADAPTER if name != "target_modules"), "load_in")
# Kinds of adapter; at their defaults they need no line.
_OF_KINDS = ("adapter", "use_rslora", "use_dora")


def resolved(given: Given, training_args: Mapping[str, object]) -> dict[str, object]:
    """Return options and fields of a run, for a file that ``--config`` takes.

    Args:
        given: Options by name, with the values that were decided.
        training_args: Fields of ``TrainingArguments``.
    """
    left_out = (*_NEVER, *(_OF_ADAPTERS if given.get("full") else ()))
    options = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in given.items()
        if name not in left_out and value is not None
        if name not in _OF_KINDS or value != ADAPTER[name][1]
    }
    if "start" in options:
        options["from"] = options.pop("start")
    return {**options, **training_args}


def write_resolved(out: Path, verb: str, settings: Mapping[str, object]) -> None:
    """Write ``config.yaml`` into the folder of a run; the main process does."""
    head = f"# ila {verb} of ila-kernels {__version__}: ila {verb} --config THIS --out OTHER\n"
    text = head + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    on_main_process(lambda: write_text_atomic(out / CONFIG, text))

"""Read the files of Spectrum: the layers that it unfroze, or the ratio of every layer.

Two files of the same tool, arXiv 2406.06623:

- YAML with ``unfrozen_parameters:``, a list of patterns, as axolotl takes it too. axolotl's rule
  holds: a pattern matches the beginning of a parameter's name, and a dot is a dot. Here a dot
  before ``*``, ``+``, ``?`` or ``{`` is any character, as scripts that follow Spectrum take it.
- ``snr_results_*.json``: layer -> its ``snr`` and its ``type``; or the sorted one, type -> layer
  -> snr. Spectrum ranks the layers of each type.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ila.boundary import InputError, reading
from ila.commands.config_file import load_yaml
from ila.masks.rules import bare, within_kinds

KEY = "unfrozen_parameters"
_ROWS = re.compile(r"(.+)\[[0-9]*(?::[0-9]*)?\]")  # axolotl's way to name rows of a tensor
_PLAIN_DOT = re.compile(r"(?<!\\)\.(?![*+?{])")


class Unfrozen(NamedTuple):
    """Layers that a file unfreezes, and its patterns that match none of the layers."""

    layers: list[str]
    unmatched: list[str]


class Ratios(NamedTuple):
    """Layers by the ratios of a file.

    Attributes:
        places: Layer -> place within its type, in (0, 1].
        unscored: Layers that the file has no number for.
        unmatched: Names in the file that are no layer here.
    """

    places: dict[str, float]
    unscored: list[str]
    unmatched: list[str]


def is_scored(file: Path) -> bool:
    """Tell a file of ratios, which wants a share to cut, from a list of unfrozen layers."""
    return file.suffix.lower() == ".json"


def read_unfrozen(file: Path, names: Sequence[str]) -> Unfrozen:
    """Match the patterns of a YAML file with the layers of a model.

    Raises:
        InputError: If the file has no such list, or a pattern is no regular expression or names
            single rows of a layer.
        ValueError: If no pattern matches a layer.
    """
    patterns = load_yaml(file).get(KEY)
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise InputError(
            f"layers {file}: must hold {KEY}, a list of patterns, got {patterns!r:.80}"
        )
    layers: set[str] = set()
    unmatched = []
    for text in patterns:
        rows = _ROWS.fullmatch(text)
        pattern = _compiled(rows[1] if rows else text, file)
        found = [name for name in names if pattern.match(f"{bare(name)}.weight")]
        if rows and found:
            raise InputError(
                f"layers {file}: {text!r} names rows of {bare(found[0])}, and a mask opens whole "
                "layers"
            )
        layers.update(found)
        if not found:
            unmatched.append(text)
    if not layers:
        raise ValueError(_matches_nothing(file, names))
    return Unfrozen([name for name in names if name in layers], unmatched)


def read_ratios(file: Path, names: Sequence[str]) -> Ratios:
    """Rank the layers of a model by the ratios of a JSON file, within the types of the file.

    Raises:
        InputError: If the file holds something else.
        ValueError: If it has no number for any layer.
    """
    ratios, kinds = _ratios_of(file)
    known = {name: bare(name) for name in names if not math.isnan(ratios.get(bare(name), math.nan))}
    if not known:
        raise ValueError(_matches_nothing(file, names))
    places = within_kinds(
        {name: ratios[short] for name, short in known.items()},
        {name: kinds[short] for name, short in known.items()},
    )
    here = {bare(name) for name in names}
    return Ratios(
        places,
        [name for name in names if name not in known],
        [name for name in ratios if name not in here],
    )


def _compiled(text: str, file: Path) -> re.Pattern[str]:
    try:
        return re.compile(_PLAIN_DOT.sub(r"\\.", text))
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"layers {file}: {text!r} is no regular expression: {error}") from error


def _ratios_of(file: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Return layer -> ratio and layer -> type of either layout."""
    with reading(file, "layers"):
        content = json.loads(file.read_text(encoding="utf-8"))
    ratios: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for name, entry in content.items() if isinstance(content, dict) else ():
        if isinstance(entry, Mapping) and set(entry) == {"snr", "type"}:
            ratios[name], kinds[name] = entry["snr"], str(entry["type"])
        elif isinstance(entry, Mapping) and not set(entry) & {"snr", "type"}:
            ratios |= entry
            kinds |= dict.fromkeys(entry, name)
        else:
            ratios[name] = entry
    wrong = [n for n, x in ratios.items() if isinstance(x, bool) or not isinstance(x, int | float)]
    if wrong or not ratios or set(kinds) != set(ratios):
        got = f"{wrong[0]!r}: {ratios[wrong[0]]!r:.60}" if wrong else f"{content!r:.60}"
        raise InputError(
            f"layers {file}: must hold a number as snr and a type for each layer, as Spectrum's "
            f"snr_results_*.json does, got {got}"
        )
    return ratios, kinds


def _matches_nothing(file: Path, names: Sequence[str]) -> str:
    return (
        f"layers {file}: nothing in it is one of the {len(names)} layers of this model, such as "
        f"{bare(names[0])}"
    )

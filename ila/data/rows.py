"""Read the rows of an instruction set, split them, fingerprint them.

A row is a plain ``dict`` as it stands in the file. This module knows no tokenizer:
``ila.data.encoding`` turns rows into tokens. The standard library reads text files, because its
errors name the fault and the line; ``pyarrow`` reads Parquet and ``datasets`` the hub, imported
when needed.
"""

import codecs
import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral, Real
from pathlib import Path

from ila.boundary import in_one_line, reading
from ila.data.messages import FIELDS, to_messages
from ila.data.tables import rows_of_columns, without_absent

__all__ = ["fingerprint", "load_rows", "split_indices", "to_messages"]

_BATCH = 65_536  # rows of a Parquet file in memory at once
_LONGEST_FIELD = 2**31 - 1  # characters; csv's own limit of 131,072 is less than a long document


def load_rows(
    source: str | Path, *, split: str = "train", limit: int | None = None
) -> list[dict[str, object]]:
    """Read the rows of a local file or of a data set on the hub.

    A local file is ``.json`` (an array, JSON lines, an object that holds the array under ``data``,
    ``rows`` or the split's name, or one that holds a list or mapping for each column, as tables
    write themselves), ``.jsonl``, ``.csv`` or ``.parquet``. CSV values stay text. In the objects of
    a table a null is an absent key. Anything else that is not a path is a hub id, with a
    configuration's name after a colon where the data set wants one (``"openai/gsm8k:main"``); code
    from the hub is never run.

    Args:
        source: Path of a file, or hub id.
        split: Split to read. A local file has one split, ``"train"``, unless it is a JSON object
            with an array under the split's name.
        limit: Most rows to read, from the start; None reads all. The function does not read the
            rest of a file of lines.

    Returns:
        The rows in their order, at least one.

    Raises:
        FileNotFoundError: The file does not exist, or the hub cannot be reached or has no such set.
        ImportError: The package that reads this kind of source is not installed.
        ValueError: The file is no readable table, holds no rows, or an argument is out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be None or at least 1, got {limit}")
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"source must be a file or a hub id, got the folder {path}")
    if path.exists():
        if path.suffix.lower() not in _READERS:
            kinds = ", ".join(_READERS)
            raise ValueError(f"source {path}: expected a file ending in {kinds}")
        if split != "train" and path.suffix.lower() != ".json":
            _one_split(path, split)
        rows = list(islice(_READERS[path.suffix.lower()](path, split, limit), limit))
    elif _looks_like_path(source):
        raise FileNotFoundError(f"source {path}: no such file")
    else:
        rows = _from_hub(str(source), split, limit)
    if not rows:
        raise ValueError(f"source {source}: no rows in it")
    return rows


def fingerprint(rows: Iterable[Mapping[str, object]]) -> str:
    """Name the content and order of rows, from any file.

    Args:
        rows: Rows; values that JSON does not know (dates, say) count as their ``str``.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits over the rows as canonical JSON lines: keys sorted,
        no spaces, ASCII only.

    >>> fingerprint([{"a": 1, "b": 2}]) == fingerprint([{"b": 2, "a": 1}])
    True
    """
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
        digest.update(line.encode("ascii") + b"\n")
    return f"sha256:{digest.hexdigest()}"


def split_indices(rows: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Shuffle the places of rows, from 0, by a seed and set some of them aside.

    Args:
        rows: Number of rows to divide.
        held_out: Rows to set aside: a count (integer), or a fraction in (0, 1), rounded to a count.
        seed: Same number of rows and seed, same division, on every machine.

    Returns:
        (train, held out), both shuffled, neither empty.

    Raises:
        ValueError: ``held_out`` is out of range or leaves one side empty.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, Real):
        raise ValueError(f"held_out must be a fraction or a count, got {held_out!r}")
    is_count = isinstance(held_out, Integral)
    if not is_count and not 0 < held_out < 1:
        raise ValueError(f"held_out must be a fraction in (0, 1) or an int count, got {held_out}")
    count = int(held_out) if is_count else round(rows * float(held_out))
    if not 0 < count < rows:
        raise ValueError(
            f"held_out must leave rows on both sides, got {held_out} of {rows} rows: "
            f"{rows - count} to train on and {count} held out"
        )
    # random() is the one method whose sequence Python promises to keep between versions.
    draw = random.Random(seed).random
    order = sorted(range(rows), key=lambda _: draw())
    return order[count:], order[:count]


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path)
        or Path(text).suffix.lower() in _READERS
        or text.startswith((".", "~", "/"))
        or text.count("/") > 1
        or "\\" in text
    )


def _from_hub(source: str, split: str, limit: int | None) -> list[dict]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"source {source} is no local file, and reading a data set of the hub needs the "
            "package datasets: pip install datasets"
        ) from error
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"source {source}: no such local file, and it could not be loaded from the hub "
            f"({error}); the path of a .json, .jsonl, .csv or .parquet file may be given instead"
        ) from error
    except Exception as error:
        raise ValueError(f"source {source}, split {split}: {in_one_line(error)}") from error
    with reading(source, "source"):
        rows = table.select(range(min(limit or len(table), len(table)))).to_list()
    return [without_absent(row) for row in rows]


def _one_split(path: Path, split: str) -> None:
    if split != "train":
        raise ValueError(f"split must be 'train' for {path}, a file of one split, got {split!r}")


def _decoded(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise ValueError(f"source {path}, line {line}: not UTF-8 text") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines that are not blank, with their numbers, and read no further than asked."""
    with path.open("rb") as file:
        # By the newline alone: JSON text may hold U+2028 and its like as they are.
        for number, raw in enumerate(file, 1):
            line = _decoded(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, path, number)
            if line.strip():
                yield number, line


def _from_json(text: str, place: str, locate: Callable[[json.JSONDecodeError], str]) -> object:
    """Parse JSON; ``locate`` says where in the place a mistake is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}, {locate(error)}: not JSON ({error.msg})") from error
    except Exception as error:  # nested too deeply, or a number of too many digits
        raise ValueError(f"{place}: not JSON that can be read ({in_one_line(error)})") from error


def _read_jsonl(path: Path, split: str, limit: int | None) -> Iterator[dict]:
    for number, line in _lines(path):
        place = f"source {path}, line {number}"
        yield _object(_from_json(line, place, lambda e: f"column {e.colno}"), place)


def _object(row: object, place: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _read_json(path: Path, split: str, limit: int | None) -> Iterator[dict]:
    if _holds_lines(path):
        _one_split(path, split)
        yield from _read_jsonl(path, split, limit)
        return
    text = _decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, 1)
    if not text.strip():
        return
    value = _from_json(
        text, f"source {path}", lambda error: f"line {error.lineno}, column {error.colno}"
    )
    if isinstance(value, dict):
        value = _array_in(value, path, split)
    else:
        _one_split(path, split)
    if not isinstance(value, list):
        raise ValueError(f"source {path}: expected a JSON array of rows, got {value!r:.40}")
    for number, row in enumerate(value, 1):
        yield _object(row, f"source {path}, row {number}")


def _holds_lines(path: Path) -> bool:
    """Tell JSON lines: the first line is an object, and another line follows."""
    first = list(islice(_lines(path), 2))
    if len(first) < 2 or not first[0][1].lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(first[0][1]), dict)
    except (ValueError, RecursionError):
        return False


def _array_in(value: dict, path: Path, split: str) -> list:
    for name in (split, "data", "rows") if split == "train" else (split,):
        if isinstance(value.get(name), list):
            return value[name]
    if split == "train" and FIELDS & value.keys():
        return rows_of_columns(value, path) or [value]
    names = "'train', 'data' or 'rows'" if split == "train" else repr(split)
    raise ValueError(f"source {path}: expected an array under {names}, got keys {list(value)[:20]}")


def _read_csv(path: Path, split: str, limit: int | None) -> Iterator[dict]:
    usual = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(csv.DictReader(file, strict=True), path)
    except UnicodeDecodeError:
        _decoded(path.read_bytes(), path, 1)  # says in which line
        raise
    finally:
        csv.field_size_limit(usual)


def _csv_rows(reader: csv.DictReader, path: Path) -> Iterator[dict]:
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            if None in row:
                width, line = len(reader.fieldnames), reader.line_num
                raise ValueError(
                    f"source {path}, line {line}: more than the header's {width} values"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"source {path}, line {reader.line_num}: not CSV ({error})") from error


def _read_parquet(path: Path, split: str, limit: int | None) -> Iterator[dict]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs the package pyarrow: pip install pyarrow"
        ) from error

    with reading(path, "source"):
        try:
            with parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=min(limit or _BATCH, _BATCH)):
                    yield from map(without_absent, batch.to_pylist())
        except ArrowInvalid as error:
            raise ValueError(f"source {path}: not Parquet ({in_one_line(error)})") from error


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

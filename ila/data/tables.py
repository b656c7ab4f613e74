"""Rows out of tables: columns turned into rows, and the nulls that a table fills in."""

from collections.abc import Mapping
from pathlib import Path

from ila.data.messages import FIELDS


def rows_of_columns(value: Mapping[str, object], path: Path) -> list[dict[str, object]] | None:
    """Read an object of columns, each a list or a mapping by row.

    Args:
        value: An object that holds a field that is understood.
        path: Its file, for errors.

    Returns:
        The rows; None if the object is one row itself. Messages are objects, and a row may hold
        lists of them; a column that is understood holds none.

    Raises:
        ValueError: The columns are not of the same rows.

    >>> rows_of_columns({"text": {"0": "a", "1": "b"}}, Path("rows.json"))
    [{'text': 'a'}, {'text': 'b'}]
    """
    columns = {name: column for name, column in value.items() if isinstance(column, dict | list)}
    ours = [name for name in columns if name in FIELDS and _is_column(columns[name])]
    if not ours:
        return None
    index = {
        name: set(column) if isinstance(column, dict) else set(map(str, range(len(column))))
        for name, column in columns.items()
    }
    wrong = [name for name in value if index.get(name) != index[ours[0]]]
    if wrong:
        raise ValueError(
            f"source {path}: {ours[0]!r} reads like a column of {len(columns[ours[0]])} rows, and "
            f"{wrong} do not have the same rows; write one object for each row"
        )
    first = columns[ours[0]]
    order = list(first) if isinstance(first, dict) else [str(i) for i in range(len(first))]
    by_row = {
        name: column if isinstance(column, dict) else dict(zip(order, column, strict=True))
        for name, column in columns.items()
    }
    return [{name: column[row] for name, column in by_row.items()} for row in order]


def without_absent(row: Mapping[str, object]) -> dict[str, object]:
    """Leave out the nulls that a table fills into objects without a key.

    A table has one set of keys for all objects of a column: the arguments of each tool would stand,
    empty, in the calls of every other.

    >>> without_absent({"call": {"city": "Rome", "amount": None}, "id": None})
    {'call': {'city': 'Rome'}, 'id': None}
    """
    return {name: _kept(value) for name, value in row.items()}


def _kept(value: object) -> object:
    if isinstance(value, dict):
        return {name: _kept(inner) for name, inner in value.items() if inner is not None}
    return [_kept(inner) for inner in value] if isinstance(value, list) else value


def _is_column(value: dict | list) -> bool:
    return isinstance(value, dict) or (
        len(value) > 0 and not any(isinstance(item, dict) for item in value)
    )

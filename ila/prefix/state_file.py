"""Keep hidden states of the rows of a data set in one memory-mapped file, whole or absent.

    states.bin    the states of row 0, 1, …, each (length, width), one after the other
    index.json    their source, lengths, and a checksum of every row

The writer fills a folder beside the place and renames it: a process killed at any moment leaves the
old cache or the new one. Opening checks sizes and checksums.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ila.runs.atomic import write_folder_atomic, write_json_atomic

FORMAT = 1
_STATES, _INDEX = "states.bin", "index.json"


class CacheError(Exception):
    """Says that a folder of states is absent, stale or damaged."""


@dataclass
class States:
    """Opened states: ``states[row]`` is a tensor (length, width) on the CPU.

    Attributes:
        folder: Folder of the two files.
        source: Description of everything that the states depend on.
        width: Elements of a state.
        dtype: Dtype of the elements.
        lengths: Tokens of each row.
        tokens_crc: ``checksum_of_tokens`` of each row.
    """

    folder: Path
    source: Mapping[str, object]
    width: int
    dtype: torch.dtype
    lengths: Sequence[int]
    tokens_crc: Sequence[int]
    _map: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        step = self.width * self.dtype.itemsize
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]) * step

    def __getstate__(self) -> dict[str, object]:
        """Leave the map out: numpy would pickle its content, and each worker opens its own."""
        return {**self.__dict__, "_map": None}

    @property
    def bytes(self) -> int:
        """Return the size of the states on the disk."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Tensor:
        raw = torch.from_numpy(self._raw(row))
        return raw.view(self.dtype).view(self.lengths[row], self.width)

    def _raw(self, row: int) -> np.ndarray:
        if self._map is None:
            # "c": torch asks for a writable array, and no write reaches the file.
            self._map = np.memmap(self.folder / _STATES, np.uint8, "c", shape=(self.bytes,))
        return self._map[self._starts[row] : self._starts[row + 1]]


def checksum_of_tokens(ids: Sequence[int] | Tensor) -> int:
    """Return the CRC-32 of token ids."""
    return zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes())


def write_states(
    folder: Path,
    source: Mapping[str, object],
    rows: Sequence[Sequence[int] | Tensor],
    width: int,
    dtype: torch.dtype,
    computed: Iterable[tuple[int, Tensor]],
) -> None:
    """Write the states of every row; a failure leaves the old folder.

    Args:
        folder: Folder to make or replace. The function removes left-overs of killed writers from
            its parent: ``.ila-tmp-*`` and ``<name>.replaced-*``.
        source: Everything that the states depend on; ``open_states`` must get the same.
        rows: Token ids of each row.
        width: Elements of a state.
        dtype: Dtype of the elements.
        computed: (row, states of shape (length, width)), every row once, in any order.

    Raises:
        ValueError: If a row is missing or has another shape.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for pattern in (".ila-tmp-*", f"{folder.name}.replaced-*"):
        for left_over in folder.parent.glob(pattern):
            shutil.rmtree(left_over)
    lengths = [len(ids) for ids in rows]
    states = States(folder, source, width, dtype, lengths, [checksum_of_tokens(r) for r in rows])
    with write_folder_atomic(folder, replace=True) as target:
        sums = _write_values(target / _STATES, states, computed)
        index = {
            "format": FORMAT,
            "source": source,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "lengths": lengths,
            "tokens_crc": list(states.tokens_crc),
            "states_crc": sums,
        }
        write_json_atomic(target / _INDEX, index)


def _write_values(
    path: Path, states: States, computed: Iterable[tuple[int, Tensor]]
) -> list[int | None]:
    """Write the states of every row into one file; return a checksum of each."""
    sums: list[int | None] = [None] * len(states)
    with open(path, "wb") as file:
        for row, values in computed:
            shape = (states.lengths[row], states.width)
            if values.shape != shape or values.dtype != states.dtype:
                raise ValueError(
                    f"states of row {row} must be {shape} {states.dtype}, got "
                    f"{tuple(values.shape)} {values.dtype}"
                )
            data = values.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
            sums[row] = zlib.crc32(data)
            file.seek(int(states._starts[row]))
            file.write(data)
        file.truncate(states.bytes)
    if None in sums:
        raise ValueError(f"states of row {sums.index(None)} are missing")
    return sums


def open_states(folder: Path, source: Mapping[str, object]) -> States:
    """Open states computed from ``source``; read all of them once and compare the checksums.

    Raises:
        CacheError: If the states are missing, have another source, or are damaged.
    """
    index = _read_index(folder)
    try:
        if index["format"] != FORMAT:
            raise CacheError(f"its format is {index['format']}, not {FORMAT}")
        mine = json.loads(json.dumps(source))
        differs = [key for key in mine if index["source"].get(key) != mine[key]]
        if differs:
            raise CacheError(f"it was computed from another {', '.join(differs)}")
        dtype = getattr(torch, index["dtype"])
        states = States(
            folder, source, index["width"], dtype, index["lengths"], index["tokens_crc"]
        )
        sums = index["states_crc"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CacheError(f"its index is damaged: {error!r}") from error
    _check_values(states, sums)
    return states


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError("there is none") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"its index cannot be read: {error}") from error


def _check_values(states: States, sums: Sequence[int]) -> None:
    """Raise unless the file has the size and the checksums of its index."""
    try:
        size = os.path.getsize(states.folder / _STATES)
    except OSError as error:
        raise CacheError(f"its states cannot be read: {error}") from error
    if size != states.bytes or len(sums) != len(states):
        raise CacheError(f"its states hold {size} bytes, not {states.bytes}")
    for row, expected in enumerate(sums):
        if zlib.crc32(states._raw(row)) != expected:
            raise CacheError(f"the states of row {row} are damaged")

"""Hidden states of the rows of a data set in one memory-mapped file, whole or not there at all.

    states.bin    the states of row 0, 1, …, each (length, width), one after the other
    index.json    what they were computed from, lengths, and a checksum of every row

The folder is written beside its place and renamed into it, so that a process killed at any moment
leaves the old cache or the new one. Sizes and checksums are verified when it is opened.
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
    """Why a folder of states cannot be used: absent, stale or damaged."""


@dataclass
class States:
    """States that were opened: ``states[row]`` is a tensor (length, width) on the CPU.

    Attributes:
        folder: Where they lie.
        source: What they were computed from.
        width: Elements of a state.
        dtype: Of the elements.
        lengths: Tokens of each row.
        tokens_crc: ``checksum_of_tokens`` of each row.
    """

    folder: Path
    source: Mapping[str, Any]
    width: int
    dtype: torch.dtype
    lengths: Sequence[int]
    tokens_crc: Sequence[int]
    _map: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        step = self.width * self.dtype.itemsize
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]) * step

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map out: numpy would pickle its content, and each worker maps for itself."""
        return {**self.__dict__, "_map": None}

    @property
    def bytes(self) -> int:
        """Size of the states on the disk."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Tensor:
        raw = torch.from_numpy(self._raw(row))
        return raw.view(self.dtype).view(self.lengths[row], self.width)

    def _raw(self, row: int) -> np.ndarray:
        if self._map is None:
            # "c": writable as torch asks, and nothing written reaches the file.
            self._map = np.memmap(self.folder / _STATES, np.uint8, "c", shape=(self.bytes,))
        return self._map[self._starts[row] : self._starts[row + 1]]


def checksum_of_tokens(ids: Any) -> int:
    """CRC-32 of token ids, a list or a tensor."""
    return zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes())


def write_states(
    folder: Path,
    source: Mapping[str, Any],
    rows: Sequence[Any],
    width: int,
    dtype: torch.dtype,
    computed: Iterable[tuple[int, Tensor]],
) -> None:
    """Write the states of every row; on any failure what ``folder`` held stays as it was.

    Args:
        folder: Made or replaced; the folder above it holds nothing else of value by the names that
            killed writers leave (``.ila-tmp-*``, ``<name>.replaced-*``): those are removed.
        source: What the states are computed from; ``open_states`` asks for the same.
        rows: Token ids of each row.
        width: Elements of a state.
        dtype: Of the elements.
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
    sums: list[int | None] = [None] * len(rows)
    with write_folder_atomic(folder, replace=True) as target:
        with open(target / _STATES, "wb") as file:
            for row, values in computed:
                if values.shape != (lengths[row], width) or values.dtype != dtype:
                    raise ValueError(
                        f"states of row {row} must be {(lengths[row], width)} {dtype}, got "
                        f"{tuple(values.shape)} {values.dtype}"
                    )
                data = values.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
                sums[row] = zlib.crc32(data)
                file.seek(int(states._starts[row]))
                file.write(data)
            file.truncate(states.bytes)
        if None in sums:
            raise ValueError(f"states of row {sums.index(None)} are missing")
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


def open_states(folder: Path, source: Mapping[str, Any]) -> States:
    """Open states computed from ``source``, after reading all of them once against their checksums.

    Raises:
        CacheError: If there are none, they were computed from something else, or are damaged.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError("there is none") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"its index cannot be read: {error}") from error
    try:
        if index["format"] != FORMAT:
            raise CacheError(f"its format is {index['format']}, not {FORMAT}")
        mine = json.loads(json.dumps(source))
        differs = [key for key in mine if index["source"].get(key) != mine[key]]
        if differs:
            raise CacheError(f"it was computed from another {', '.join(differs)}")
        states = States(
            folder,
            source,
            index["width"],
            getattr(torch, index["dtype"]),
            index["lengths"],
            index["tokens_crc"],
        )
        sums = index["states_crc"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CacheError(f"its index is damaged: {error!r}") from error
    try:
        size = os.path.getsize(folder / _STATES)
    except OSError as error:
        raise CacheError(f"its states cannot be read: {error}") from error
    if size != states.bytes or len(sums) != len(states):
        raise CacheError(f"its states hold {size} bytes, not {states.bytes}")
    for row, expected in enumerate(sums):
        if zlib.crc32(states._raw(row)) != expected:
            raise CacheError(f"the states of row {row} are damaged")
    return states

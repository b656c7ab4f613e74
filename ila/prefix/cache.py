"""The frozen-prefix cache: hidden states at the first open block, computed once per row.

Below its lowest open block a model computes the same states for a row in every epoch. The cache
computes them once, before the first step, and keeps them on disk. Every step then runs the
remaining blocks on them, so that forward skips the prefix as backward does:

    h = blocks[k−1](… blocks[0](embedding(ids)))        once per row
    loss = head(blocks[n−1](… blocks[k](h)))            every step

The cache is exact to the rounding of the states' dtype: batches hold rows of like length, and a
GEMM rounds by the shape of its batch, as it does between two shuffles of the same data. The states
of a row do not depend on the other rows of its batch, the order of the data or the seed.
``PrefixCache.prepare`` refuses a model for which the cache would not be exact. It also checks that
the remaining blocks need the states alone: on the first rows the logits must be the same bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ila.data.contracts import Collate, Dataset
from ila.models.blocks import AFTER_BLOCKS, Blocks, find_blocks
from ila.prefix.batches import CachedCollator, NumberedRows
from ila.prefix.frozen_prefix import Prefix, Whole, skipping
from ila.prefix.state_file import CacheError, States, open_states, write_states
from ila.runs.processes import on_main_process


@dataclass(frozen=True)
class PrefixCache:
    """States of a data set, ready for training.

    Give ``dataset`` and ``collator`` to the Trainer (``remove_unused_columns=False``) and train
    inside ``with cache.skipping():``. ``ila.training.train`` does this itself.

    Attributes:
        model: Model whose first ``blocks`` blocks ``skipping`` skips.
        blocks: Number of blocks in the prefix.
        states: States at the input of the block after the prefix.
        dataset: Rows with their numbers.
        collator: Turns rows into batches of ``inputs_embeds``, ``attention_mask`` and ``labels``.
        built: Reason to compute the states; None if the folder held them.
        seconds: Time to open or compute them.
    """

    model: nn.Module
    blocks: int
    states: States
    dataset: NumberedRows
    collator: CachedCollator
    built: str | None
    seconds: float

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        dataset: Dataset,
        collator: Collate,
        folder: Path,
        *,
        batch_size: int = 8,
        limit_bytes: int = 20 * 2**30,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        progress: bool = True,
    ) -> PrefixCache:
        """Open the states in ``folder``, or compute them if absent, stale or damaged.

        Args:
            model: Model with its mask applied, on its device.
            dataset: Rows with ``input_ids`` and ``labels``, the same in every epoch; a row whose
                tokens change later raises when a batch takes it.
            collator: Turns rows into a batch, padded on the right.
            folder: Folder for this cache alone; one process computes at a time.
            batch_size: Rows in a batch while the states are computed.
            limit_bytes: Most bytes of states on the disk.
            autocast: Makes the context of each forward.
            progress: Whether to show a progress bar on stderr.

        Raises:
            ValueError: If the cache would not be exact: the first block or the embedding trains,
                the prefix computes at random (dropout, NEFTune) or looks at the other rows of a
                batch (LLM.int8() on a GPU), or the blocks need more than hidden states. If the
                model is sharded already. If the states would exceed the limit or the disk. If a
                row is empty.
        """
        begin = time.perf_counter()
        builder = _Builder(model, autocast, folder / "states", batch_size, limit_bytes, progress)
        source = on_main_process(lambda: builder.ensure(dataset))
        states = builder.opened
        if states is None:
            states = open_states(builder.place, source)
        return cls(
            model=model,
            blocks=source["prefix length"],
            states=states,
            dataset=NumberedRows(dataset),
            collator=CachedCollator(collator, states),
            built=builder.built,
            seconds=time.perf_counter() - begin,
        )

    def skipping(self) -> AbstractContextManager[Whole]:
        """Skip the prefix: the model takes states as ``inputs_embeds``, and no ``input_ids``."""
        return skipping(find_blocks(self.model), self.blocks)

    def as_dict(self) -> dict[str, object]:
        """Return the skipped blocks and the cost of the states, for JSON."""
        total = len(find_blocks(self.model).layers)
        return {
            "blocks": self.blocks,
            "of_blocks": total,
            "bytes": self.states.bytes,
            "seconds": self.seconds,
            "built": self.built,
        }


@dataclass
class _Builder:
    """Opens the states of a data set, or computes them.

    Attributes:
        place: Folder of the states.
        opened: States that were there and could be used.
        built: Reason to compute them.
    """

    model: nn.Module
    autocast: Callable[[], AbstractContextManager]
    place: Path
    batch_size: int
    limit_bytes: int
    progress: bool
    opened: States | None = None
    built: str | None = None

    def ensure(self, dataset: Dataset) -> dict[str, Any]:
        """Make the folder hold the states; return their source."""
        prefix = Prefix.of(self.model, self.autocast)
        rows = _tokens(dataset)
        width, dtype = prefix.check_exact(_tried(rows))
        source = _source(prefix.blocks, prefix.depth, rows, dtype, self.batch_size)
        try:
            self.opened = open_states(self.place, source)
        except CacheError as reason:
            self.built = str(reason)
            _check_room(self.place, rows, width, dtype, self.limit_bytes)
            computed = prefix.computed(rows, self.batch_size, self.progress)
            ids = [row.tolist() for row in rows]
            write_states(self.place, source, ids, width, dtype, computed)
        return source


def _tokens(dataset: Dataset) -> list[Tensor]:
    rows = [torch.as_tensor(dataset[i]["input_ids"]) for i in range(len(dataset))]
    empty = next((i for i, ids in enumerate(rows) if len(ids) == 0), None)
    if empty is not None:
        raise ValueError(f"dataset rows must hold at least one token, row {empty} has none")
    return rows


def _tried(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the longest and the shortest row: their states depend most on a row's company."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [rows[order[-1]]] if len(rows) == 1 else [rows[order[-1]], rows[order[0]]]


def _check_room(
    place: Path, rows: Sequence[Tensor], width: int, dtype: torch.dtype, limit_bytes: int
) -> None:
    tokens = sum(len(ids) for ids in rows)
    need = tokens * width * dtype.itemsize
    sizes = f"{tokens} tokens of {width} × {dtype.itemsize} bytes are {need / 2**30:.2f} GiB"
    if need > limit_bytes:
        raise ValueError(
            f"the prefix cache would exceed its limit of {limit_bytes / 2**30:.2f} GiB: {sizes}"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if need > free:
        raise ValueError(f"the prefix cache does not fit on its disk, {free} bytes free: {sizes}")


def _source(
    blocks: Blocks, depth: int, rows: Sequence[Tensor], dtype: torch.dtype, batch_size: int
) -> dict[str, Any]:
    """Describe everything that the states depend on; errors show the keys to the user."""
    data = hashlib.blake2b(digest_size=16)
    for ids in rows:
        data.update(f"{len(ids)} ".encode() + ids.to(torch.int64).numpy().tobytes())
    config = getattr(blocks.decoder, "config", None)
    return {
        "model": _weights(blocks, depth),
        "configuration": "" if config is None else _digest(config.to_dict()),
        "data": data.hexdigest(),
        "prefix length": depth,
        "dtype": str(dtype),
        "batch size": batch_size,
        "device": next(blocks.decoder.parameters()).device.type,
        "version": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _weights(blocks: Blocks, depth: int) -> str:
    """Digest every weight below block ``depth``, and the scalings of its adapters."""
    digest = hashlib.blake2b(digest_size=16)
    others = [m for n, m in blocks.decoder.named_children() if n not in AFTER_BLOCKS]
    others.remove(blocks.layers)
    for part in (*others, *blocks.layers[:depth]):
        for name, tensor in part.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
                digest.update(memoryview(raw.numpy()))
        for name, module in part.named_modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict):
                active = [module.active_adapters, module.disable_adapters, scaling]
                digest.update(f"{name} {active} ".encode())
    return digest.hexdigest()


def _digest(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

"""The frozen-prefix cache: hidden states at the first open block, computed once per example.

Below its lowest open block a model computes the same for a row in every epoch. Those states are
computed once, before the first step, and kept on the disk; every step then runs the remaining
blocks on them, so that forward skips the prefix as backward does:

    h = blocks[k−1](… blocks[0](embedding(ids)))        once per row
    loss = head(blocks[n−1](… blocks[k](h)))            every step

Exact: the states are those that the step would compute itself, to the rounding of their dtype. They
are computed in batches of rows of like length, and a GEMM rounds by the shape of its batch, as it
does between two shuffles of the same data. A row's states do not depend on the row's company, the
order of the data or the seed. Where it would not be exact, ``PrefixCache.prepare`` refuses: see
there. That the remaining blocks need nothing but the states is not believed, but tried on the
first rows: the logits must be the same bits.
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

from ila.models.blocks import AFTER_BLOCKS, Blocks, find_blocks
from ila.prefix.batches import CachedCollator, NumberedRows
from ila.prefix.frozen_prefix import Prefix, skipping
from ila.prefix.state_file import CacheError, States, open_states, write_states
from ila.runs.processes import on_main_process


@dataclass(frozen=True)
class PrefixCache:
    """States of a data set, ready to be trained on.

    ``dataset`` and ``collator`` replace those of the Trainer (with ``remove_unused_columns=False``)
    and training runs inside ``with cache.skipping():``. ``ila.training.train`` does this itself.

    Attributes:
        model: Its first ``blocks`` blocks are skipped inside ``skipping``.
        blocks: Blocks of the prefix.
        states: The states at the input of the block after them.
        dataset: The rows, each with its number.
        collator: Rows to batches of ``inputs_embeds``, ``attention_mask`` and ``labels``.
        built: Why the states were computed; None if they were there.
        seconds: What opening or computing them took.
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
        dataset: Sequence[Mapping[str, Any]],
        collator: Any,
        folder: Path,
        *,
        batch_size: int = 8,
        limit_bytes: int = 20 * 2**30,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        progress: bool = True,
    ) -> PrefixCache:
        """Open the states in ``folder``, or compute them if absent, stale or damaged.

        Args:
            model: With its mask applied, on its device.
            dataset: Rows with ``input_ids`` and ``labels``, the same in every epoch; a row whose
                tokens have changed since is an error when it comes up.
            collator: Rows to a batch, padded on the right.
            folder: A folder for this cache alone; one process computes at a time.
            batch_size: Rows in a batch while the states are computed.
            limit_bytes: Most that the states may take on the disk.
            autocast: Makes the context of each forward, if training runs under one.
            progress: Show a progress bar on stderr while computing.

        Raises:
            ValueError: If it would not be exact: nothing is frozen below the first block, the
                embedding is trained, something in the prefix is random (dropout, NEFTune) or looks
                at the other rows of a batch (LLM.int8() on a GPU), or the blocks need more than
                hidden states. If the model is sharded already. If the states would exceed the
                limit or the disk. If a row is empty.
        """
        begin = time.perf_counter()
        place = folder / "states"
        built: list[str] = []
        opened: list[States] = []

        def ensure() -> dict[str, Any]:
            prefix = Prefix.of(model, autocast)
            rows = _tokens(dataset)
            width, dtype = prefix.check_exact(_tried(rows))
            source = _source(prefix.blocks, prefix.depth, rows, dtype, batch_size)
            try:
                opened.append(open_states(place, source))
            except CacheError as why:
                built.append(str(why))
                _check_room(place, rows, width, dtype, limit_bytes)
                computed = prefix.computed(rows, batch_size, progress)
                write_states(place, source, [r.tolist() for r in rows], width, dtype, computed)
            return source

        source = on_main_process(ensure)
        states = opened[0] if opened else open_states(place, source)
        return cls(
            model,
            source["prefix length"],
            states,
            NumberedRows(dataset),
            CachedCollator(collator, states),
            built[0] if built else None,
            time.perf_counter() - begin,
        )

    def skipping(self) -> AbstractContextManager[None]:
        """Skip the prefix: the model takes states as ``inputs_embeds``, and no ``input_ids``."""
        return skipping(find_blocks(self.model), self.blocks)

    def as_dict(self) -> dict[str, Any]:
        """What it skips and costs, for JSON."""
        total = len(find_blocks(self.model).layers)
        return {
            "blocks": self.blocks,
            "of_blocks": total,
            "bytes": self.states.bytes,
            "seconds": self.seconds,
            "built": self.built,
        }


def _tokens(dataset: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    rows = [torch.as_tensor(dataset[i]["input_ids"]) for i in range(len(dataset))]
    empty = next((i for i, ids in enumerate(rows) if len(ids) == 0), None)
    if empty is not None:
        raise ValueError(f"dataset rows must hold at least one token, row {empty} has none")
    return rows


def _tried(rows: Sequence[Tensor]) -> list[Tensor]:
    """The longest row and the shortest: what depends on a row's company differs most there."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [rows[order[-1]]] if len(rows) == 1 else [rows[order[-1]], rows[order[0]]]


def _check_room(place: Path, rows, width: int, dtype: torch.dtype, limit_bytes: int) -> None:
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


def _source(blocks: Blocks, depth: int, rows, dtype: torch.dtype, batch_size: int) -> dict:
    """What the states hang on; each entry by the name that a user knows it by."""
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
    """Digest of every weight below block ``depth``, and of what scales its adapters."""
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


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

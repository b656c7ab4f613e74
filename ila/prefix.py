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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ila.checkpointing import AFTER_BLOCKS, Blocks, find_blocks, frozen_blocks, is_trained
from ila.ranks import on_main_process
from ila.states import CacheError, States, checksum_of_tokens, open_states, write_states

_ROW = "ila_prefix_row"
_KEYS = {"input_ids", "attention_mask", "labels"}
IGNORED = -100


@dataclass(frozen=True)
class PrefixCache:
    """States of a data set, ready to be trained on.

    ``dataset`` and ``collator`` replace those of the Trainer (with ``remove_unused_columns=False``)
    and training runs inside ``with cache.skipping():``. ``ila.train`` does this itself.

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
                embedding is trained, something in the prefix is random (dropout, NEFTune), or the
                blocks need more than hidden states. If the states would exceed the limit or the
                disk. If a row is empty.
        """
        begin = time.perf_counter()
        blocks = find_blocks(model)
        depth = _frozen_depth(model, blocks)
        _refuse_random(blocks, depth)
        rows = [torch.as_tensor(dataset[i]["input_ids"]) for i in range(len(dataset))]
        empty = next((i for i, ids in enumerate(rows) if len(ids) == 0), None)
        if empty is not None:
            raise ValueError(f"dataset rows must hold at least one token, row {empty} has none")
        reader = _Reader(model, blocks, depth, autocast)
        width, dtype = _check_exact(reader, rows[: min(2, batch_size)])
        source = _source(blocks, depth, rows, dtype, batch_size)
        place = folder / "states"
        built: list[str] = []
        opened: list[States] = []

        def ensure() -> None:
            try:
                opened.append(open_states(place, source))
            except CacheError as why:
                built.append(str(why))
                _check_room(place, rows, width, dtype, limit_bytes)
                computed = reader.computed(rows, batch_size, progress)
                write_states(place, source, [r.tolist() for r in rows], width, dtype, computed)

        on_main_process(ensure)
        states = opened[0] if opened else open_states(place, source)
        return cls(
            model,
            depth,
            states,
            NumberedRows(dataset),
            CachedCollator(collator, states),
            built[0] if built else None,
            time.perf_counter() - begin,
        )

    def skipping(self) -> AbstractContextManager[None]:
        """Skip the prefix: the model takes states as ``inputs_embeds``, and no ``input_ids``."""
        return _skipping(find_blocks(self.model), self.blocks)

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


@dataclass(frozen=True)
class NumberedRows:
    """A data set whose rows know their number."""

    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], _ROW: int(index)}


@dataclass(frozen=True)
class CachedCollator:
    """Batches of states in place of tokens; everything else as ``inner`` makes it."""

    inner: Any
    states: States

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Raises:
            ValueError: If the collator does something that the states do not know of, or a row has
                changed since its states were computed.
        """
        if any(_ROW not in row for row in rows):
            raise ValueError(
                "rows must come from the cache's dataset with their numbers; with a Trainer of "
                "your own, set remove_unused_columns=False"
            )
        plain = [{name: value for name, value in row.items() if name != _ROW} for row in rows]
        batch = dict(self.inner(plain))
        unknown = sorted(set(batch) - _KEYS)
        if unknown:
            raise ValueError(f"the prefix cache does not know what {unknown} of the collator mean")
        ids = batch.pop("input_ids")
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        if "labels" in batch and (batch["labels"][~mask] != IGNORED).any():
            raise ValueError("labels must be -100 on padding to train on cached states")
        states = torch.zeros(*ids.shape, self.states.width, dtype=self.states.dtype)
        for at, row in enumerate(rows):
            number, tokens = row[_ROW], torch.as_tensor(row["input_ids"])
            count = len(tokens)
            if checksum_of_tokens(tokens) != self.states.tokens_crc[number]:
                raise ValueError(
                    f"row {number} of the dataset has changed since its states were computed; data "
                    "that changes from epoch to epoch cannot be cached"
                )
            kept = int(mask[at].sum())
            whole = kept == count and bool(mask[at, :count].all())
            if not whole or not torch.equal(ids[at, :count].cpu(), tokens):
                raise ValueError(
                    "the collator must keep each row's tokens and pad on the right to use cached "
                    f"states; it changed row {number}"
                )
            states[at, :count] = self.states[number]
        return {**batch, "inputs_embeds": states}


class _ReachedError(Exception):
    """Raised at the block that needs no computing, with what it was given."""


@dataclass(frozen=True)
class _Reader:
    """Computes states with a model."""

    model: nn.Module
    blocks: Blocks
    depth: int
    autocast: Callable[[], AbstractContextManager]

    def computed(
        self, rows: Sequence[Tensor], batch_size: int, progress: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Every row and its states, in batches of rows of like length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        title = f"States of {self.depth} frozen blocks"
        screen = Console(stderr=True)
        for members in track(batches, title, console=screen, disable=not progress, transient=True):
            states, _ = self.read([rows[i] for i in members])
            for i, values in zip(members, states, strict=True):
                yield i, values[: len(rows[i])]

    def read(self, rows: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """States (rows, length, width) as training computes them, and the batch they are of."""
        batch = self.batch(rows)

        def stop(module, args, kwargs):
            raise _ReachedError(args[0] if args else kwargs["hidden_states"])

        block = self.blocks.layers[self.depth]
        # First of its hooks: what a sharding wrapper would gather for the block is not needed.
        handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        modes = {module: module.training for module in self.model.modules()}
        self.model.train()
        try:
            with torch.no_grad(), self.autocast():
                self.model(**batch, use_cache=False)
        except _ReachedError as reached:
            return reached.args[0].detach(), batch
        finally:
            handle.remove()
            for module, mode in modes.items():
                module.training = mode
        raise RuntimeError(f"the model ended before its block {self.depth}")

    def batch(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (rows, length), padded on the right with id 0."""
        device = next(self.model.parameters()).device
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}

    def logits(self, **batch: Tensor) -> Tensor:
        """Logits of the whole model, or of the rest of it, without dropout."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                return self.model(**batch, use_cache=False).logits
        finally:
            for module, mode in modes.items():
                module.training = mode


def _frozen_depth(model: nn.Module, blocks: Blocks | None) -> int:
    if blocks is None:
        raise ValueError(f"cache_prefix needs a model with blocks, got {type(model).__name__}")
    # Something has to be left that turns states into logits.
    depth = min(frozen_blocks(model), len(blocks.layers) - 1)
    if depth == 0:
        embedding = is_trained(blocks.decoder.get_input_embeddings())
        why = "the embedding is trained" if embedding else "the first block has an open layer"
        raise ValueError(f"cache_prefix needs a frozen prefix, and there is none: {why}")
    return depth


def _refuse_random(blocks: Blocks, depth: int) -> None:
    embedding = blocks.decoder.get_input_embeddings()
    if getattr(embedding, "neftune_noise_alpha", None):
        raise ValueError("cache_prefix would not be exact: NEFTune adds noise to the embeddings")
    for part in (embedding, *blocks.layers[:depth]):
        for module in part.modules():
            p = module.p if isinstance(module, nn.Dropout) else 0.0
            p = p or getattr(module, "attention_dropout", 0.0) or 0.0
            if p > 0:
                raise ValueError(
                    f"cache_prefix would not be exact: dropout {p} is active in the frozen prefix "
                    f"({type(module).__name__}); set it to 0 in the model's configuration"
                )


def _check_exact(reader: _Reader, rows: Sequence[Tensor]) -> tuple[int, torch.dtype]:
    """Compute the first rows in full and from their states; return the states' width and dtype."""
    device = next(reader.model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        states, batch = reader.read(rows)
        again, _ = reader.read(rows)
        full = reader.logits(**batch)
        mask = batch.pop("attention_mask").bool()
        embeds = states.masked_fill(~mask[..., None], 0.0)
        with _skipping(reader.blocks, reader.depth):
            rest = reader.logits(inputs_embeds=embeds, attention_mask=mask.long())
    if not torch.equal(states, again):
        raise ValueError("cache_prefix would not be exact: the frozen prefix computes at random")
    if not torch.equal(full[mask], rest[mask]):
        raise ValueError(
            "cache_prefix would not be exact: the blocks of this model "
            f"({type(reader.blocks.decoder).__name__}) need more than hidden states"
        )
    return states.shape[-1], states.dtype


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


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _refuse_tokens(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError(
        "the frozen prefix is skipped: the model takes batches of the prefix cache, not token ids"
    )


@contextmanager
def _skipping(blocks: Blocks, depth: int) -> Iterator[None]:
    # On the instances, so that names of parameters stay what they are and checkpoints fit.
    replaced = {block: _pass_on for block in blocks.layers[:depth]}
    replaced[blocks.decoder.get_input_embeddings()] = _refuse_tokens
    before = {module: vars(module).get("forward") for module in replaced}
    for module, forward in replaced.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward

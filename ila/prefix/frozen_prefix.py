"""Cut a model at its lowest open block, into the frozen prefix and the rest.

``Prefix.states`` runs the prefix alone, ``skipping`` runs the rest alone, and
``Prefix.check_exact`` checks that the two make the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ila.boundary import reading
from ila.models.blocks import Blocks, find_blocks, frozen_blocks, is_trained
from ila.models.layer import FUSED, MaskedLoraLayer
from ila.runs.progress import bar


class _ReachedError(Exception):
    """Carries the input of the first block after the prefix out of the model."""

    def __init__(self, states: Tensor):
        self.states = states


@dataclass(frozen=True)
class Prefix:
    """The blocks of a model below its lowest open one.

    Attributes:
        model: The whole model.
        blocks: All its blocks.
        depth: Number of blocks in the prefix.
        autocast: Makes the context of each forward.
    """

    model: nn.Module
    blocks: Blocks
    depth: int
    autocast: Callable[[], AbstractContextManager]

    @classmethod
    def of(cls, model: nn.Module, autocast: Callable[[], AbstractContextManager]) -> Prefix:
        """Find the frozen prefix of a model.

        Raises:
            ValueError: If the model has no frozen prefix, or its states could differ from step to
                step: it computes at random, looks at the other rows of a batch, or is sharded.
        """
        blocks = find_blocks(model)
        if blocks is None:
            raise ValueError(f"cache_prefix needs a model with blocks, got {type(model).__name__}")
        # At least one block stays: training needs one to turn states into logits.
        depth = min(frozen_blocks(model), len(blocks.layers) - 1)
        if depth == 0:
            embedding = is_trained(blocks.decoder.get_input_embeddings())
            why = "the embedding is trained" if embedding else "the first block has an open layer"
            raise ValueError(f"cache_prefix needs a frozen prefix, and there is none: {why}")
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError(
                "cache_prefix needs a model that is not sharded yet: one process computes the "
                "states, and a sharded model runs on all; load it again"
            )
        _refuse_balance(model)
        _refuse_positions_of_a_batch(blocks)
        _refuse_random(blocks, depth)
        _refuse_company(blocks, depth)
        return cls(model, blocks, depth, autocast)

    def computed(
        self, rows: Sequence[Tensor], batch_size: int, progress: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield every row and its states, from batches of rows of like length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        title = f"States of {self.depth} frozen blocks"
        for members in bar(batches, title, show=progress, transient=True):
            states, _ = self.states([rows[i] for i in members])
            for i, values in zip(members, states, strict=True):
                yield i, values[: len(rows[i])]

    def states(self, rows: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return states (rows, length, width) as training computes them, and their batch."""
        batch = self._batch(rows)

        def stop(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            raise _ReachedError(args[0] if args else kwargs["hidden_states"])

        block = self.blocks.layers[self.depth]
        # Before all other hooks: a sharding wrapper need not gather the block.
        handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            self._logits(**batch)
        except _ReachedError as reached:
            return reached.states.detach(), batch
        finally:
            handle.remove()
        raise RuntimeError(f"the model ended before its block {self.depth}")

    def check_exact(self, rows: Sequence[Tensor]) -> tuple[int, torch.dtype]:
        """Compute rows in full and from their states; return the states' width and dtype.

        Raises:
            ValueError: If the prefix is random or looks at the other rows of a batch, the model
                cannot be cut at the prefix, or the logits are not the same bits.
        """
        with self._same_random_numbers():
            states, batch = self._first_states(rows)
            again, _ = self.states(rows)
        if not torch.equal(states, again):
            raise ValueError(
                "cache_prefix would not be exact: the frozen prefix computes at random"
            )
        self._check_alone(rows, states)
        mask = batch["attention_mask"].bool()
        embeds = states.masked_fill(~mask[..., None], 0.0)
        # As training computes them, LoRA's dropout included: int8 layers quantise otherwise.
        with self._same_random_numbers():
            full = self._logits(**batch)
        if not torch.equal(full[mask], self._rest(embeds, mask)[mask]):
            raise ValueError(
                "cache_prefix would not be exact: the blocks of this model "
                f"({type(self.blocks.decoder).__name__}) need more than hidden states"
            )
        return states.shape[-1], states.dtype

    def _first_states(self, rows: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the states of the first rows; a model that does not give them is refused."""
        name = type(self.blocks.decoder).__name__
        with reading(name, f"cache_prefix cannot stop before block {self.depth} of"):
            states, batch = self.states(rows)
        if not isinstance(states, Tensor) or states.shape[:2] != batch["input_ids"].shape:
            raise ValueError(
                f"cache_prefix needs hidden states (rows, length, width) before block {self.depth} "
                f"of {name}, which gives {getattr(states, 'shape', type(states).__name__)}"
            )
        return states, batch

    def _rest(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Logits from states; a model whose blocks cannot be run without the prefix is refused."""
        name = type(self.blocks.decoder).__name__
        why = f"cache_prefix cannot run the blocks after block {self.depth} alone in"
        with self._same_random_numbers(), skipping(self.blocks, self.depth), reading(name, why):
            return self._logits(inputs_embeds=embeds, attention_mask=mask.long())

    def _check_alone(self, rows: Sequence[Tensor], states: Tensor) -> None:
        """Refuse states that differ by more than rounding when a row is alone in its batch.

        Rounding is at the end of the digits of a dtype, and rows that look at each other differ at
        their beginning; √eps is the middle.
        """
        if len(rows) < 2:
            return
        # Models compute norms and routers in float32, over float64 weights too.
        rounding = max(torch.finfo(dtype).eps for dtype in (states.dtype, torch.float32))
        for row, together in zip(rows, states, strict=True):
            with self._same_random_numbers():
                alone, _ = self.states([row])
            one, other = (values[: len(row)].double() for values in (alone[0], together))
            error = float((one - other).norm() / one.norm().clamp_min(1e-30))
            if error > math.sqrt(rounding):
                raise ValueError(
                    "cache_prefix would not be exact: the states of a row depend on the other rows "
                    f"of its batch; alone they differ by {error:.2g} of their norm"
                )

    def _same_random_numbers(self) -> AbstractContextManager[None]:
        device = next(self.model.parameters()).device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def _batch(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Make ``input_ids`` and ``attention_mask`` (rows, length), padded right with id 0."""
        device = next(self.model.parameters()).device
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}

    def _logits(self, **batch: Tensor) -> Tensor:
        """Return the logits of the model in training mode."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.train()
        try:
            with torch.no_grad(), self.autocast():
                return self.model(**batch, use_cache=False).logits
        finally:
            for module, mode in modes.items():
                module.training = mode


def _refuse_balance(model: nn.Module) -> None:
    """Refuse a loss with a part for the balance of experts: it reads the routers of all blocks."""
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError(
            "cache_prefix would not be exact: with output_router_logits=True the loss has a part "
            "for the balance of experts, which reads the routers of the prefix too"
        )


def _refuse_positions_of_a_batch(blocks: Blocks) -> None:
    """Refuse rotary embeddings whose frequencies follow the longest row of a batch."""
    for name, module in blocks.decoder.named_modules():
        types = getattr(module, "rope_type", None)
        for kind in types.values() if isinstance(types, Mapping) else (types,):
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise ValueError(
                    f"cache_prefix would not be exact: rope_type {kind!r} ({name}) turns positions "
                    "by the longest row of a batch, so that the states of a row depend on its "
                    "company; train without the cache"
                )


def _refuse_random(blocks: Blocks, depth: int) -> None:
    embedding = blocks.decoder.get_input_embeddings()
    if getattr(embedding, "neftune_noise_alpha", None):
        raise ValueError("cache_prefix would not be exact: NEFTune adds noise to the embeddings")
    for part in (embedding, *blocks.layers[:depth]):
        inert = _inert_dropouts(part)
        for module in part.modules():
            if module in inert:
                continue
            p = module.p if isinstance(module, nn.Dropout) else 0.0
            shares = (p, getattr(module, "attention_dropout", 0.0))  # of some a module
            p = max(share for share in shares if isinstance(share, int | float))
            if p > 0:
                raise ValueError(
                    f"cache_prefix would not be exact: dropout {p} is active in the frozen prefix "
                    f"({type(module).__name__}); set it to 0 in the model's configuration"
                )


def _inert_dropouts(part: nn.Module) -> set[nn.Module]:
    """Return the dropouts of layers that a mask keeps in place: a constant update has none."""
    layers = [m for m in part.modules() if isinstance(m, MaskedLoraLayer)]
    return {
        layer.lora_dropout[route.adapter]
        for layer in layers
        if (route := layer.route()).path == FUSED and layer.is_kept(route.adapter)
    }


def _refuse_company(blocks: Blocks, depth: int) -> None:
    """Refuse LLM.int8() where it quantises x: the columns it spares depend on the whole batch."""
    for module in blocks.layers[:depth].modules():
        if type(module).__name__ != "Linear8bitLt":  # by name: bitsandbytes need not be there
            continue
        # On a CPU its training does not quantise x.
        if module.weight.device.type not in ("cpu", "xpu") and module.state.threshold > 0:
            raise ValueError(
                "cache_prefix would not be exact: LLM.int8() chooses the columns of x that it does "
                "not quantise by all rows of a batch, so that the states of a row depend on its "
                "company; load the model in 4 bits, or with llm_int8_threshold=0"
            )


def _pass_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def _refuse_tokens(*args: object, **kwargs: object) -> Tensor:
    raise RuntimeError(
        "the frozen prefix is skipped: the model takes batches of the prefix cache, not token ids"
    )


# A context in which a model with a skipped prefix is whole again.
Whole = Callable[[], AbstractContextManager[None]]


@contextmanager
def skipping(blocks: Blocks, depth: int) -> Iterator[Whole]:
    """Skip the first blocks: the model takes states as ``inputs_embeds``, and no ``input_ids``.

    Yields:
        Makes a context in which the model is whole, for a loss between two steps.
    """
    # Set on the instances: parameters keep their names, so that checkpoints fit.
    replaced = {block: _pass_on for block in blocks.layers[:depth]}
    replaced[blocks.decoder.get_input_embeddings()] = _refuse_tokens
    before = {module: vars(module).get("forward") for module in replaced}
    with _forwards(replaced, before):
        yield partial(_forwards, before, replaced)


@contextmanager
def _forwards(
    inside: Mapping[nn.Module, Callable[..., Tensor] | None],
    after: Mapping[nn.Module, Callable[..., Tensor] | None],
) -> Iterator[None]:
    """Give modules a forward of their own in the ``with``; None is that of their class."""
    try:
        for module, forward in inside.items():
            vars(module).pop("forward", None)
            vars(module).update({} if forward is None else {"forward": forward})
        yield
    finally:
        for module, forward in after.items():
            vars(module).pop("forward", None)
            vars(module).update({} if forward is None else {"forward": forward})

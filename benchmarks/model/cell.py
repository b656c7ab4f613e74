"""Training steps of whole models, in turn, on the same batches.

A step is forward, backward, an update by AdamW and the release of gradients. Every contestant
trains on its own adapter from the same start, on the batch of the round.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ila
from benchmarks.harness.gate import assert_gradients, assert_within_rounding
from benchmarks.harness.memory import peak_tensor_bytes
from benchmarks.harness.session import Options, Row
from benchmarks.harness.timing import Run, interleaved, ratio, spread
from benchmarks.model.contestants import (
    BASE_DTYPE,
    KERNELS,
    LIGER,
    Spec,
    build,
    layer_names,
    mask_of,
)
from benchmarks.model.material import Material, base_model
from benchmarks.peers import liger
from ila.prefix.cache import PrefixCache
from ila_kernels import prefer

LEARNING_RATE = 1e-4
PHASES = ("forward", "backward", "update")
Batches = Callable[[int], dict[str, Tensor]]
# Loss, and the gradient of every trained parameter.
Truth = tuple[Tensor, dict[str, Tensor]]
# Ratios are taken to PEFT, and tables show the others.
NEEDED = ("PEFT", "ours", "frozen")


@dataclass(eq=False)
class ModelCell:
    """Contestants on one model, all in one interleaved run.

    Attributes:
        name: Of the cell.
        specs: The contestants; ``Spec("PEFT")`` is the one that ratios are taken to.
        batch: Rows of a batch.
        width: Tokens of a row, padding included.
        batches: Different batches; they come again and again.
        rank: R.
        rounds: Interleaved rounds.
        model: Made from the base on first use, if not the base itself.
        strict: Whether a contestant that computes something else fails the cell; else one that is
            not PEFT, ``"ours"`` or the frozen model is left out by name.
        joined: Rows joined end to end, so that every token is a label.
        left_out: Contestants that cannot run here, and why.
    """

    options: Options
    name: str
    specs: Sequence[Spec]
    batch: int
    width: int
    rounds: int
    batches: int = 4
    rank: int = 8
    model: Callable[[], nn.Module] | None = None
    strict: bool = True
    joined: bool = False
    masks: dict[tuple[float, str], ila.LayerMask] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def checked(self) -> Sequence[Spec]:
        """Contestants whose first loss and gradients are those of PEFT on the same layers."""
        return self.specs

    @property
    def contestants(self) -> list[str]:
        return [spec.name for spec in self.specs]

    @cached_property
    def base(self) -> nn.Module:
        return base_model(self.options) if self.model is None else self.model()

    @cached_property
    def material(self) -> Material:
        return Material.read(self.options, self.batches, self.batch, self.width, self.joined)

    @cached_property
    def names(self) -> list[str]:
        return layer_names(self.base)

    def mask(self, spec: Spec) -> ila.LayerMask:
        """The mask that a contestant's share and position mean."""
        if spec.opened not in self.masks:
            file = self.options.mask
            learned = ila.LayerMask.load(file) if spec.position == "learned" else None
            self.masks[spec.opened] = mask_of(self.names, *spec.opened, learned=learned)
        return self.masks[spec.opened]

    def conditions(self) -> dict[str, Any]:
        config = self.base.config
        return {
            "model": getattr(config, "_name_or_path", "") and Path(config._name_or_path).name,
            "blocks": config.num_hidden_layers,
            "layers": len(self.names),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "rank": self.rank,
            "rows": self.batch,
            "width": self.width,
            "tokens_per_step": self.material.tokens,
            "labelled": self.material.labelled,
            "answers": self.material.answers,
            "batches": self.batches,
            "rounds": self.rounds,
            "optimizer": "AdamW",
            "attention": config._attn_implementation,
            "left_out": self.left_out,
        }

    def built(self, spec: Spec, stack: ExitStack) -> tuple[nn.Module, Batches]:
        """A contestant's model and its batches, until ``stack`` is closed."""
        model = build(spec, self.base, self.mask(spec), self.rank)
        return model, (cached(model, self.material, stack) if spec.cache else self.material)

    def run_of(self, spec: Spec, stack: ExitStack) -> Run:
        """What a contestant does in a step, until ``stack`` is closed."""
        step = training(*self.built(spec, stack))

        def run(mark: Callable[[], None], turn: int) -> None:
            with kernels_of(spec):
                step(mark, turn)

        return run

    # --- the gate

    def check(self) -> None:
        """Losses and gradients of the first batch, of every contestant, against fp64.

        Raises:
            AssertionError: If one is further from fp64 than its dtype explains.
        """
        groups: dict[tuple[float, str], list[Spec]] = {}
        for spec in self.checked:
            if spec.kind != "frozen":
                groups.setdefault(spec.opened, []).append(spec)
        for group in groups.values():
            self._check_group(group)

    def _check_group(self, specs: Sequence[Spec]) -> None:
        exact, plain = self.reference(specs[0])
        for spec in specs:
            try:
                self._compare(spec, exact, plain)
            except AssertionError as error:
                if self._is_needed(spec):
                    raise AssertionError(f"{spec.name}: {error}") from error
                self._leave_out(spec, error)
            except Exception as error:
                if self._is_needed(spec):
                    raise
                self._leave_out(spec, error)

    def _is_needed(self, spec: Spec) -> bool:
        return self.strict or spec.kind in NEEDED

    def _leave_out(self, spec: Spec, error: Exception) -> None:
        self.left_out[spec.name] = f"{type(error).__name__}: {error}"
        self.specs = [other for other in self.specs if other is not spec]

    def _compare(self, spec: Spec, exact: Truth, plain: Truth) -> None:
        with ExitStack() as stack:
            model, batches = self.built(spec, stack)
            with kernels_of(spec):
                loss, gradients = loss_and_gradients(model, batches(0))
        assert_within_rounding(loss, exact[0], plain[0], "loss of the first batch")
        assert_gradients(gradients, exact[1], plain[1], self.base.dtype)

    def reference(
        self, spec: Spec, change: Callable[[nn.Module], None] | None = None
    ) -> list[Truth]:
        """Loss and gradients of the first batch by PEFT on the same open layers: (fp64, plain).

        Plain has everything in the base's dtype, adapters too. Transformers computes norms and the
        loss in fp32 whatever the dtype: beside the rounding of bf16 that is nothing.
        """
        wide, narrow = Spec("PEFT", *spec.opened), Spec(BASE_DTYPE, *spec.opened)
        both = []
        for spec, dtype in ((wide, torch.float64), (narrow, self.base.dtype)):
            model = build(spec, self.base, self.mask(spec), self.rank)
            if dtype == torch.float64:
                model = copy.deepcopy(model).double()  # in place, and the base's are shared
            if change is not None:
                change(model)
            loss, gradients = loss_and_gradients(model, self.material(0))
            both.append((loss.to(dtype), gradients))
        return both

    # --- the measurement

    def measure(self) -> tuple[list[Row], Mapping[str, list[float]]]:
        with ExitStack() as stack:
            runs, peaks = {}, {}
            for spec in self.specs:
                run = runs[spec.name] = self.run_of(spec, stack)
                run(_nothing, 0)  # the optimiser's state is there from its first step on
                device = self.options.device
                peaks[spec.name] = peak_tensor_bytes(lambda run=run: run(_nothing, 0), device)
            times = interleaved(runs, self.rounds, self.options.watch, warm_up=1)
        rows = [self._row(spec, times, peaks[spec.name]) for spec in self.specs]
        return rows, {name: [sum(t) / 1e3 for t in rounds] for name, rounds in times.items()}

    def _row(self, spec: Spec, times: Mapping[str, list[list[float]]], peak: int) -> Row:
        total = {name: [sum(t) for t in rounds] for name, rounds in times.items()}
        own = total[spec.name]
        row = spread(own) | {
            "contestant": spec.name, "kind": spec.kind, "share": spec.share,
            "position": spec.position, "checkpoints": spec.checkpoints, "cache": spec.cache,
            "tokens_per_s": self.material.tokens / spread(own)["median_ms"] * 1e3,
            "peak_bytes": peak,
        }  # fmt: skip
        for phase, values in zip(PHASES, zip(*times[spec.name], strict=True), strict=True):
            row[f"{phase}_ms"] = spread(values)["median_ms"]
        everywhere = Spec("PEFT", checkpoints=spec.checkpoints).name
        same = Spec("PEFT", *spec.opened, checkpoints=spec.checkpoints).name
        for key, other in (("peft", everywhere), ("restricted", same)):
            against = ratio(own, total[other]) if other in total else {}
            prefix = "" if key == "peft" else "restricted_"
            row[f"ratio_to_{key}"] = against.get("median")
            row |= {f"{prefix}{name}": against.get(name) for name in ("p10", "p90")}
        return row


def cached(model: nn.Module, material: Material, stack: ExitStack) -> Batches:
    """Let a model skip its frozen prefix until ``stack`` is closed; batches are read from disk."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    cache = PrefixCache.prepare(
        model, material.rows, material.collator, folder, batch_size=material.batch, progress=False
    )
    stack.enter_context(cache.skipping())

    def batch(turn: int) -> dict[str, Tensor]:
        tensors = cache.collator([cache.dataset[i] for i in material.members(turn)])
        return {name: tensor.to(material.device) for name, tensor in tensors.items()}

    return batch


def training(model: nn.Module, batches: Batches) -> Run:
    """A training step, in the phases ``PHASES``; nothing to update where nothing is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE) if trained else None

    def run(mark: Callable[[], None], turn: int) -> None:
        loss = model(**batches(turn)).loss
        mark()
        loss.backward()
        mark()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        mark()

    return run


@contextmanager
def kernels_of(spec: Spec) -> Iterator[None]:
    """Let a contestant run on the kernels that it stands for."""
    prefer(auto=KERNELS.get(spec.kind))
    try:
        with liger.in_force() if spec.kind == LIGER else nullcontext():
            yield
    finally:
        prefer()


def loss_and_gradients(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of every trained parameter, with dropout off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    loss = model(**batch).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.requires_grad}


def _nothing() -> None:
    pass

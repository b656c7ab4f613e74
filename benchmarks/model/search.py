"""What a step of each stage of the search costs, beside a step of LoRA training.

Stage 1 is LoRA training with the free signal read off its gradients; in stage 2 everything is
frozen but one score a layer, either walked along a path (no optimiser at work) or trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.harness.gate import assert_gradients
from benchmarks.harness.session import Row
from benchmarks.harness.timing import Run
from benchmarks.model.cell import LEARNING_RATE, ModelCell
from benchmarks.model.contestants import Spec, build
from ila.models.edit import masked_layers
from ila.search.gate_gradients import GateGradient, LayerMean, PathGradient
from ila.search.learn import SearchConfig
from ila.search.stage2 import PATH_POINTS, scored
from ila.training.config import TrainConfig

STAGE1, PATH, TRAINED = "ours, stage 1", "ours, stage 2 (path)", "ours, stage 2 (ila)"
METHODS = {"path": PATH, "ila": TRAINED, "gate_gradient": None}
# Of the paper's milestone study: stage 1 takes 25 to 50 % of a full run.
STAGE1_SHARE = 0.25


class SearchCell(ModelCell):
    """LoRA steps of PEFT and ours, and steps of both stages, interleaved."""

    @property
    def checked(self) -> Sequence[Spec]:
        return [spec for spec in self.specs if spec.kind not in (PATH, TRAINED)]

    def check(self) -> None:
        """Also compare the gradients of the scores with ⟨dB, B⟩ γ (1 − γ) of PEFT in fp64.

        Raises:
            AssertionError: If they are further off than the dtype explains.
        """
        super().check()
        exact, plain = self._score_gradients()
        model = build(Spec("ours"), self.base, self.mask(Spec("ours")), self.rank)
        layers = masked_layers(model, "default")
        with scored(model, layers, "default", SearchConfig().score_init):
            model(**self.material(0)).loss.backward()
            gradients = [layer.lora_S["default"].grad for layer in layers.values()]
        actual = {"the scores": torch.cat(gradients)}
        assert_gradients(actual, exact, plain, self.base.dtype)

    def _score_gradients(self) -> list[dict[str, Tensor]]:
        """dL/ds of every layer, by PEFT with γ folded into B: dL/dγ = ⟨dL/d(γB), B⟩."""
        start = torch.tensor(SearchConfig().score_init, dtype=torch.float64)
        gamma = torch.sigmoid(start).item()
        bs: list[dict[str, Tensor]] = []

        def fold(model: nn.Module) -> None:
            named = {n: p for n, p in model.named_parameters() if ".lora_B." in n}
            bs.append({n: p.detach().double() for n, p in named.items()})
            for parameter in named.values():
                parameter.data.mul_(gamma)

        by_dtype = []
        for (_, gradients), b in zip(self.reference(Spec("ours"), fold), bs, strict=True):
            products = torch.stack([(gradients[n].double() * b[n]).sum() for n in b])
            by_dtype.append({"the scores": products * gamma * (1.0 - gamma)})
        return by_dtype

    def run_of(self, spec: Spec, stack: ExitStack) -> Run:
        if spec.kind not in (STAGE1, PATH, TRAINED):
            return super().run_of(spec, stack)
        model, batches = self.built(spec, stack)
        layers = masked_layers(model, "default")
        rate, signal = LEARNING_RATE, None
        if spec.kind == STAGE1:
            signal = GateGradient(layers, "default")
        else:
            stack.enter_context(scored(model, layers, "default", SearchConfig().score_init))
            rate = SearchConfig().score_learning_rate
        if spec.kind == PATH:
            signal, rate = PathGradient(layers, "default", PATH_POINTS), 0.0
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        return _stage_step(model, batches, optimizer, signal)

    def measure(self) -> tuple[list[Row], Mapping[str, list[float]]]:
        rows, seconds = super().measure()
        return [*rows, *totals(rows)], seconds


def _stage_step(model, batches, optimizer, signal: LayerMean | None) -> Run:
    """A step as ``SignalTrainer`` makes it."""

    def run(mark: Callable[[], None], turn: int) -> None:
        if isinstance(signal, PathGradient):
            signal.on_step_begin(None, SimpleNamespace(global_step=turn), None)
        loss = model(**batches(turn)).loss
        mark()
        loss.backward()
        mark()
        if signal is not None:
            signal.gather(turn)
        optimizer.step()
        optimizer.zero_grad()
        mark()

    return run


def totals(rows: Sequence[Row]) -> list[Row]:
    """A whole search by each method, with the default steps, in ours and in LoRA steps.

    Derived from the steps measured: s₁ steps of stage 1 and s₂ of stage 2, against a LoRA run of
    T steps, once T of ``ila train`` and once the T of which s₁ is a quarter.
    """
    ms = {row["contestant"]: row["median_ms"] for row in rows}
    config, lines = SearchConfig(), []
    runs = (TrainConfig().steps, round(config.stage1_steps / STAGE1_SHARE))
    for method, stage2 in METHODS.items():
        steps = config.stage2_steps if stage2 is not None else 0
        whole = config.stage1_steps * ms[STAGE1] + (steps * ms[stage2] if stage2 else 0.0)
        row: Row = {
            "kind": "total", "method": method, "stage1_steps": config.stage1_steps,
            "stage2_steps": steps, "total_ms": whole, "lora_steps": whole / ms["ours"],
            "peft_lora_steps": whole / ms["PEFT"],
        }  # fmt: skip
        row["shares"] = {str(t): {"ours": whole / (t * ms["ours"]),
                                  "PEFT": whole / (t * ms["PEFT"])} for t in runs}  # fmt: skip
        lines.append(row)
    return lines

"""Stage 2 of the search: one score per layer trains, γ = σ(s), and all weights are frozen.

With A and B frozen the op keeps t (M, R) for backward instead of x, and computes dγ alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ila.models.layer import MaskedLoraLayer
from ila.runs.processes import average_over_processes
from ila.search.gate_gradients import SignalTrainer
from ila.training.callbacks import LogFile

PATH_POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)


@contextmanager
def scored(
    peft_model: PeftModel,
    layers: Mapping[str, MaskedLoraLayer],
    adapter: str,
    score_init: float,
) -> Iterator[None]:
    """Give every layer a score and freeze all else; undo both on leaving.

    Scores are fp32 (fp64 over an fp64 base), shape (1,), on the device of their layer.
    """
    # By name: sharding replaces the parameters.
    required = {name: p.requires_grad for name, p in peft_model.named_parameters()}
    for layer in layers.values():
        weight = layer.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        start = torch.full((1,), score_init, dtype=wide, device=weight.device)
        layer.lora_S[adapter] = nn.Parameter(start)
    freeze_all_but_scores(peft_model)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.lora_S[adapter]
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(required[name])


def freeze_all_but_scores(model: nn.Module) -> None:
    """Let only the parameters in a layer's ``lora_S`` require grad."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_S." in f".{name}.")


def read_scores(layers: Mapping[str, MaskedLoraLayer], adapter: str) -> dict[str, float]:
    """Return module name -> s."""
    values = torch.cat([layer.lora_S[adapter].detach() for layer in layers.values()])
    return dict(zip(layers, values.to("cpu", torch.float64).tolist(), strict=True))


class ScoreTrainer(SignalTrainer):
    """Trainer of the scores; it freezes the adapter again, which PEFT makes trainable on loading.

    FSDP does not shard the scores: each is one number, and a model that stage 1 has sharded takes
    no more parameters. Every process holds all scores and their mean gradient.
    """

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            named = self.model.named_modules()
            scores = [module for name, module in named if name.endswith(".lora_S")]
            self.accelerator.state.fsdp_plugin.ignored_modules = scores

    def finish_gradients(self) -> None:
        """Average the gradients of the scores, which FSDP leaves alone."""
        if self.is_fsdp_enabled:
            trained = (p for p in self.model.parameters() if p.requires_grad)
            average_over_processes([p.grad for p in trained if p.grad is not None])

    def _load_from_checkpoint(self, *args: object, **kwargs: object) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        freeze_all_but_scores(self.model)


class LogSpread(TrainerCallback):
    """Log smallest, largest, mean and standard deviation of s at every step."""

    def __init__(self, layers: Mapping[str, MaskedLoraLayer], adapter: str, log: LogFile | None):
        self.layers, self.adapter, self.log = layers, adapter, log

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Log the spread of the scores."""
        if self.log is None or not state.is_world_process_zero:
            return
        scores = torch.tensor(list(read_scores(self.layers, self.adapter).values()))
        spread = {"min": scores.min(), "max": scores.max(), "mean": scores.mean()}
        spread["std"] = scores.std(correction=0)
        self.log.write(step=state.global_step, scores={k: float(v) for k, v in spread.items()})

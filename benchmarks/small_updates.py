"""What is left of a small update in a 16-bit y and dx, and what writing it first costs on a CPU.

    python -m benchmarks.small_updates --json benchmarks/results/small-updates.json

The share of an update that survives is ⟨y − base, update⟩ / ⟨update, update⟩, with the base product
rounded alone; 1 is all of it. The times are of our op, forward and backward, with the update before
the base product over the base product first: the same code with one switch. In our op the update
comes first where ``eager.base_adds`` says so; where it does not, the two are the same code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import ila
from benchmarks.harness.busy import Busy, load_average
from benchmarks.harness.session import environment
from benchmarks.harness.timing import Run, Watch, interleaved, ratio
from benchmarks.layer.contestants import peft_layer
from benchmarks.layer.shapes import shape
from benchmarks.model.cell import training
from benchmarks.model.contestants import fill_adapters, lora
from benchmarks.peers.addmm import addmm_lora
from ila.runs.atomic import write_json_atomic
from ila_kernels import eager, masked_lora_linear
from ila_kernels.testing import Inputs, make_inputs

M, K, N, R = 256, 1024, 1024, 16
SIZES = (1e-2, 3e-3, 1e-3, 3e-4)
TIMED = (
    *(("SmolLM2-135M", layer, m) for m in (512, 1024) for layer in ("q", "up", "down")),
    ("SmolLM2-135M", "up", 2048),
    ("Llama-3-8B", "k", 512),
    ("Llama-3-8B", "q", 256),
)
STEPS = ((2, 128), (4, 256))  # rows and tokens of a row of a training step
STEP_MODEL = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
BF16 = torch.bfloat16


class Parts(NamedTuple):
    """The base product and the update of y or of dx, in fp64."""

    base: Tensor
    update: Tensor


def parts(i: Inputs, of: str) -> Parts:
    x, weight, dy, a, b = (t.detach().double() for t in (i.x, i.weight, i.dy, i.lora_a, i.lora_b))
    if of == "y":
        return Parts(x @ weight.t(), x @ a.t() @ b.t())
    return Parts(dy @ weight, dy @ b @ a)


def with_update_of(size: float, of: str) -> Inputs:
    """Draw a layer in bf16 with fp32 adapters whose update is ``size`` of the base product."""
    i = make_inputs(M, K, N, R, dtype=BF16, adapter_dtype=torch.float32)
    drawn = parts(i, of)
    with torch.no_grad():
        i.lora_b.mul_(size * drawn.base.norm() / drawn.update.norm())
    return i


def contestants(i: Inputs) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> x to y; scale 1 everywhere."""
    layer = peft_layer(i)
    layer.scaling["default"] = 1.0
    return {
        "PEFT": layer,
        "base first": lambda x: addmm_lora(x, i.weight, i.lora_a, i.lora_b, 1.0),
        "ours": lambda x: masked_lora_linear(x, i.weight, i.lora_a, i.lora_b),
    }


def share(result: Tensor, base: Tensor, update: Tensor) -> float:
    """The share of the update in a result."""
    kept = (result.detach().double() - base.detach().double()) * update
    return (kept.sum() / update.square().sum()).item()


def shares(size: float, of: str) -> dict[str, float]:
    """Name -> the share of the update that is left in ``of``, y or dx."""
    i, found = with_update_of(size, of), {}
    update = parts(i, of).update
    base = F.linear(i.x, i.weight) if of == "y" else i.dy @ i.weight
    for name, run in contestants(i).items():
        y = run(i.x)
        result = y if of == "y" else torch.autograd.grad(y, i.x, i.dy)[0]
        found[name] = share(result, base, update)
    return found


@contextmanager
def base_first() -> Iterator[None]:
    """Let the eager path compute the base product before the update."""
    first, eager.base_adds = eager.base_adds, lambda *_: False
    try:
        yield
    finally:
        eager.base_adds = first


def seconds_ratio(model: str, layer: str, m: int, rounds: int, watch: Watch) -> dict[str, float]:
    """Time with the update first over time with the base first, in rounds."""
    k, n = shape(model, layer)
    i = make_inputs(m, k, n, R, dtype=BF16, adapter_dtype=torch.float32)
    leaves = (i.x, i.lora_a, i.lora_b)

    def step(mark: Callable[[], None], turn: int) -> None:
        y = masked_lora_linear(i.x, i.weight, i.lora_a, i.lora_b)
        torch.autograd.grad(y, leaves, i.dy)
        mark()

    def old(mark: Callable[[], None], turn: int) -> None:
        with base_first():
            step(mark, turn)

    return _ratio(step, old, rounds, watch, calls=3)


def step_ratio(rows: int, width: int, rounds: int, watch: Watch) -> dict[str, float]:
    """The same for a training step of SmolLM2-135M's shapes, random weights, all layers open."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(STEP_MODEL).to(BF16)
    model = ila.attach(model, lora(R)).train()
    fill_adapters(model)
    ila.lean_head(model)
    ids = torch.randint(STEP_MODEL.vocab_size, (rows, width))
    step = training(model, lambda _: {"input_ids": ids, "labels": ids})

    def old(mark: Callable[[], None], turn: int) -> None:
        with base_first():
            step(mark, turn)

    return _ratio(step, old, rounds, watch)


def _ratio(new: Run, old: Run, rounds: int, watch: Watch, calls: int = 1) -> dict[str, float]:
    runs = {"update first": new, "base first": old}
    times = interleaved(runs, rounds, watch, calls=calls)
    after, before = ([sum(t) for t in times[name]] for name in runs)
    return ratio(after, before)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args(arguments)
    cpu = torch.device("cpu")
    watch, busy = Watch(cpu, "cpu"), Busy(cpu, load_average())
    busy.sample()
    rows = [{"size": size, **{of: shares(size, of) for of in ("y", "dx")}} for size in SIZES]
    timed = [
        {
            "model": model,
            "layer": layer,
            "m": m,
            **seconds_ratio(model, layer, m, given.rounds, watch),
        }
        for model, layer, m in TIMED
    ]
    steps = [
        {"rows": rows, "width": width, **step_ratio(rows, width, given.rounds, watch)}
        for rows, width in STEPS
    ]
    busy.sample()
    options = {"m": M, "k": K, "n": N, "rank": R, "rounds": given.rounds, "clock": "cpu"}
    content = {"environment": environment(cpu), "options": options, "busy": busy.as_dict()}
    write_json_atomic(given.json, content | {"rows": rows, "timed": timed, "steps": steps})


if __name__ == "__main__":
    main()

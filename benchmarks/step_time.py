"""Time of one training step, interleaved: PEFT, ours with all layers open, ours with a mask.

    python -m benchmarks.step_time --model FOLDER --mask run/mask-top-0.3.json --json FILE
    python -m benchmarks.step_time --model FOLDER --top 0.3 --checkpoint --json FILE

`--top 0.3` opens the last 30 % of the layers by position, with and without the prefix cache (whose
steps include reading the states); `--checkpoint` adds each model under gradient checkpointing.
On a machine that is shared, `--clock cpu` counts what this process computed, over all its threads
(run it with OMP_WAIT_POLICY=PASSIVE, or waiting counts too).

All contestants hold the same weights and see the same batch in turn; the losses of all-open models
are compared before anything is timed. Speeds are medians over rounds of PEFT's time / time in
the same round; `frozen` (forward and backward to the input, no adapter) is the floor.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from torch import nn

import ila
from ila.data import Collator
from ila.files import write_json_atomic
from ila.loading import LOAD_IN, find_source, load_model
from ila.model import masked_layers
from ila.pipeline import versions
from ila.prefix import PrefixCache

# Endings of names whose loss must be that of the name without them.
SAME = (", checkpoints", ", prefix cache")
Batches = Callable[[], dict[str, torch.Tensor]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def at_the_top(base: nn.Module, share: float) -> ila.LayerMask:
    """A mask that opens the last ``share`` of the layers by position."""
    config = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        empty = type(base)(base.config)
    names = list(masked_layers(ila.attach(empty, config), "default"))
    first = len(names) - round(share * len(names))
    gates = {name: at >= first for at, name in enumerate(names)}
    return ila.LayerMask(dict.fromkeys(names, 0.0), gates)


def contestants(base: nn.Module, mask: ila.LayerMask | None, rank: int) -> dict[str, nn.Module]:
    """Models that share nothing but their initial values."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config.init_lora_weights = False  # B ≠ 0: every path has its whole work to do
    torch.manual_seed(0)
    peft = get_peft_model(copy.deepcopy(base), config)
    ours = copy.deepcopy(peft)
    ila.convert(ours)
    found: dict[str, nn.Module] = {"peft": peft, "ours, all open": ours}
    if mask is not None:
        masked = copy.deepcopy(ours)
        share = len(mask.open) / len(mask)
        ila.apply_mask(masked, mask)
        found[f"ours, {share:.0%} open"] = masked
        found[f"peft, {share:.0%} targeted"] = _restricted(base, config, mask)
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    found["frozen"] = frozen
    return found


def _restricted(base: nn.Module, config: LoraConfig, mask: ila.LayerMask) -> PeftModel:
    """What PEFT alone gives a user who knows the layers: adapters on those, by name."""
    config = copy.deepcopy(config)
    config.target_modules = {name.removeprefix("base_model.model.") for name in mask.open}
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(base), config)


def checkpointed(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same models under gradient checkpointing, as transformers' Trainer turns it on."""
    found = {f"{name}, checkpoints": copy.deepcopy(model) for name, model in models.items()}
    for model in found.values():
        model.activation_checkpointing_enable()
    return found


def cached(model: nn.Module, ids: torch.Tensor, folder: str, stack: ExitStack) -> Batches:
    """Let a model skip its frozen prefix until ``stack`` is closed; its batches are read anew."""
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    cache = PrefixCache.prepare(model, rows, Collator(0), Path(folder), batch_size=len(rows))
    stack.enter_context(cache.skipping())

    def batch() -> dict[str, torch.Tensor]:
        found = cache.collator([cache.dataset[i] for i in range(len(rows))])
        return {name: tensor.to(ids.device) for name, tensor in found.items()}

    return batch


def step(
    model: nn.Module, batches: Batches, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """One forward and backward: (milliseconds, loss)."""
    model.zero_grad(set_to_none=True)
    begin = clock()
    batch = batches()
    loss = model(**batch).loss
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    return (clock() - begin) * 1e3, loss.item()


def measure(
    models: dict[str, nn.Module], batches: dict[str, Batches], rounds: int, clock: str
) -> dict[str, Any]:
    """Interleaved rounds after one warm-up; refuses to report if the losses disagree."""
    losses = {name: step(model.train(), batches[name])[1] for name, model in models.items()}
    pairs = [("ours, all open", "peft")]
    pairs += [(name, name.rpartition(", ")[0]) for name in losses if name.endswith(SAME)]
    for name, other in pairs:
        if abs(losses[name] / losses[other] - 1) > 1e-2:
            raise SystemExit(f"not measured: losses differ beyond bf16 rounding: {losses}")
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(rounds), "Interleaved rounds"):
        for name, model in models.items():
            times[name].append(step(model, batches[name], CLOCKS[clock])[0])
    rows = {}
    for name, values in times.items():
        speed = sorted(p / v for p, v in zip(times["peft"], values, strict=True))
        rows[name] = {
            "median_ms": statistics.median(values),
            "speed_relative_to_peft": statistics.median(speed),
            "p10": speed[len(speed) // 10],
            "p90": speed[-1 - len(speed) // 10],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--top", type=float, help="instead of --mask: open the last share")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--load-in", choices=LOAD_IN)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_model(find_source(options.model), load_in=options.load_in, device=device)
    mask = None if options.mask is None else ila.LayerMask.load(options.mask)
    if options.top is not None:
        mask = at_the_top(base, options.top)
    torch.manual_seed(0)
    shape = (options.rows, options.tokens)
    ids = torch.randint(base.config.vocab_size, shape, device=device)
    models = contestants(base, mask, options.rank)
    if options.checkpoint:
        models |= checkpointed({n: m for n, m in models.items() if n != "frozen"})
    batches: dict[str, Batches] = {n: lambda: {"input_ids": ids, "labels": ids} for n in models}
    with ExitStack() as stack:
        if options.top is not None:
            name = f"ours, {options.top:.0%} open"
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            skipped = models[f"{name}, prefix cache"] = copy.deepcopy(models[name])
            batches[f"{name}, prefix cache"] = cached(skipped, ids, folder, stack)
        rows = measure(models, batches, options.rounds, options.clock)
    for name, row in rows.items():
        print(
            f"{name:36} {row['median_ms']:9.1f} ms  {row['speed_relative_to_peft']:.2f} x as fast "
            f"as PEFT [{row['p10']:.2f}-{row['p90']:.2f}]"
        )
    environment = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    environment |= {"device": device, "versions": versions()}
    kept = {k: v for k, v in vars(options).items() if k not in ("model", "mask", "json")}
    kept |= {"model": Path(options.model).name, "dtype": str(base.dtype)}
    write_json_atomic(options.json, {"environment": environment, "options": kept, "rows": rows})


if __name__ == "__main__":
    main()

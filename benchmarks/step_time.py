"""Time of one training step, interleaved: PEFT, ours with all layers open, ours with a mask.

    python -m benchmarks.step_time --model FOLDER --mask run/mask-top-0.3.json --json FILE

All contestants hold the same weights and see the same batch in turn; the losses of all-open models
are compared before anything is timed. Speeds are medians over rounds of PEFT's time / time in
the same round; `frozen` (forward and backward to the input, no adapter) is the floor.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from torch import nn

import ila
from ila.files import write_json_atomic
from ila.loading import LOAD_IN, find_source, load_model
from ila.pipeline import versions


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


def step(model: nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """One forward and backward: (milliseconds, loss)."""
    model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3, loss.item()


def measure(models: dict[str, nn.Module], ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Interleaved rounds after one warm-up; refuses to report if the losses disagree."""
    losses = {name: step(model.train(), ids)[1] for name, model in models.items()}
    if abs(losses["ours, all open"] / losses["peft"] - 1) > 1e-2:
        raise SystemExit(f"not measured: losses differ beyond bf16 rounding: {losses}")
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(rounds), "Interleaved rounds"):
        for name, model in models.items():
            times[name].append(step(model, ids)[0])
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
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--load-in", choices=LOAD_IN)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_model(find_source(options.model), load_in=options.load_in, device=device)
    mask = None if options.mask is None else ila.LayerMask.load(options.mask)
    torch.manual_seed(0)
    shape = (options.rows, options.tokens)
    ids = torch.randint(base.config.vocab_size, shape, device=device)
    rows = measure(contestants(base, mask, options.rank), ids, options.rounds)
    for name, row in rows.items():
        print(
            f"{name:20} {row['median_ms']:9.1f} ms  {row['speed_relative_to_peft']:.2f} x as fast "
            f"as PEFT [{row['p10']:.2f}-{row['p90']:.2f}]"
        )
    environment = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    environment |= {"device": device, "versions": versions()}
    kept = {k: v for k, v in vars(options).items() if k not in ("model", "mask", "json")}
    kept |= {"model": Path(options.model).name, "dtype": str(base.dtype)}
    write_json_atomic(options.json, {"environment": environment, "options": kept, "rows": rows})


if __name__ == "__main__":
    main()

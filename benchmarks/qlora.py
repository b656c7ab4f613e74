"""QLoRA beside PEFT's: the loss of every step, and the peak memory of training.

    python -m benchmarks.qlora --model FOLDER --load-in 4bit --json FILE

Each contestant trains in a process of its own, from the same weights on the same batches. Peak
memory counts from after the model was loaded; on a CPU it is the resident set. Time is not
measured here: `pytest benchmarks/test_layer.py` times a layer over an NF4 base.
"""

from __future__ import annotations

import argparse
import ctypes.util
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import ila
from ila.commands.inputs import versions
from ila.models.loading import LOAD_IN, find_source, load_model
from ila.runs.atomic import write_json_atomic
from ila.runs.meter import peak_bytes, reset_peak

CONTESTANTS = ("peft", "ours", "ours, closed below the top 30%")


def settle() -> None:
    """Give back what loading the model freed: how much of it stays resident is chance."""
    gc.collect()
    libc = ctypes.util.find_library("c")
    if sys.platform == "linux" and libc is not None:
        trim = getattr(ctypes.CDLL(libc), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def contestant(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one contestant in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_model(find_source(options.model), options.dtype, options.load_in, device)
    config = LoraConfig(
        r=options.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    if name != "peft":
        names = ila.convert(model).swapped
        if name != "ours":
            ila.apply_mask(
                model, ila.LayerMask({n: float(i) for i, n in enumerate(names)}).top(0.3)
            )
    generator = torch.Generator().manual_seed(0)
    shape = (2, options.rows, options.tokens)
    batches = torch.randint(base.config.vocab_size, shape, generator=generator).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    losses = []
    settle()
    measured = reset_peak(device)
    start = peak_bytes(device)
    for step in range(options.steps):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    peak = peak_bytes(device) if measured else None
    return {"losses": losses, "loaded_bytes": start, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-in", choices=LOAD_IN, default="4bit")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", choices=CONTESTANTS, help="run one, in this process")
    options = parser.parse_args()
    if options.only:
        write_json_atomic(options.json, contestant(options.only, options))
        return
    rows = {}
    for index, name in enumerate(CONTESTANTS):
        part = options.json.with_name(f"{options.json.name}.{index}")
        command = [sys.executable, "-m", "benchmarks.qlora", *sys.argv[1:]]
        subprocess.run([*command, "--json", str(part), "--only", name], check=True, env=os.environ)
        rows[name] = json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    peft = rows["peft"]
    for name, row in rows.items():
        pairs = zip(row["losses"], peft["losses"], strict=True)
        row["largest_relative_difference"] = max(abs(a / b - 1) for a, b in pairs)
        text = f"{name:32} loss {row['losses'][0]:.4f} → {row['losses'][-1]:.4f}"
        if name == "ours":
            text += f", off PEFT's by at most {row['largest_relative_difference']:.1e}"
        if row["peak_bytes"] is not None:
            mib = {key: row[f"{key}_bytes"] / 2**20 for key in ("loaded", "peak")}
            text += (
                f"; peak {mib['peak']:.0f} MiB, {mib['peak'] - mib['loaded']:.0f} over the model"
            )
        print(text)
    environment = {"threads": torch.get_num_threads(), "versions": versions()}
    kept = {k: v for k, v in vars(options).items() if k not in ("model", "json", "only")}
    kept["model"] = Path(options.model).name
    write_json_atomic(options.json, {"environment": environment, "options": kept, "rows": rows})


if __name__ == "__main__":
    main()

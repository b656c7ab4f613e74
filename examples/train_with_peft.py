"""Train every linear layer with peft and transformers alone, for comparison with this library.

Run: python examples/train_with_peft.py --model MODEL --rows ROWS.json --out adapter
ROWS.json holds tokens: {"train": [{"input_ids", "labels"}, …], "held_out": […], "pad": 0}.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Clock(TrainerCallback):
    """Sums up the time of every step, forward to update."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.began


def batch_of(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """Rows as one batch, padded on the right; padding has no label."""
    ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
    mask = [torch.ones_like(row) for row in ids]
    columns = {"input_ids": (ids, pad), "labels": (labels, -100), "attention_mask": (mask, 0)}
    return {n: pad_sequence(c, batch_first=True, padding_value=v) for n, (c, v) in columns.items()}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: list[dict], pad: int, size: int) -> float:
    """Nats per answer token."""
    model.eval()
    total = count = 0.0
    for start in range(0, len(rows), size):
        batch = batch_of(rows[start : start + size], pad)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


def peak_bytes() -> int | None:
    """Highest memory of this process; None where it is unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def reset_peak() -> None:
    """Forget the peak so far, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rows = json.loads(Path(options.rows).read_text(encoding="utf-8"))
    pad, size = rows["pad"], options.batch_size
    base = AutoModelForCausalLM.from_pretrained(options.model)
    set_seed(options.seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    before = held_out_loss(model, rows["held_out"], pad, size)
    arguments = TrainingArguments(
        output_dir=f"{options.out}/checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=size,
        learning_rate=options.learning_rate,
        warmup_steps=round(0.03 * options.steps),
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=10,
    )
    trainer = Trainer(model, arguments, lambda some: batch_of(some, pad), rows["train"])
    clock = Clock()
    trainer.add_callback(clock)
    reset_peak()
    busy = time.process_time()
    trainer.train()
    measured = {
        "seconds": clock.seconds,
        "processor_seconds": time.process_time() - busy,
        "peak_memory_bytes": peak_bytes(),
        "held_out_loss_before": before,
        "held_out_loss": held_out_loss(model, rows["held_out"], pad, size),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "learning_rate": options.learning_rate,
        "steps": options.steps,
    }
    model.save_pretrained(options.out)
    (Path(options.out) / "metrics.json").write_text(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()

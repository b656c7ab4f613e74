"""Write the model card of an adapter: its training, and the code that loads it."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel

from ila.models.base_starts import starts_of
from ila.runs.atomic import write_text_atomic
from ila.runs.metrics import Metrics

CARD = "README.md"


def write_card(
    folder: Path, peft_model: PeftModel, adapter: str, metrics: Metrics | None = None
) -> None:
    """Write the card of an adapter, in place of the empty one that PEFT writes.

    Args:
        folder: Folder of the adapter, with its configuration.
        peft_model: Model with the adapter.
        adapter: Name of the adapter.
        metrics: Metrics of a finished training; the card leaves out names, times and memory.
    """
    config = peft_model.peft_config[adapter]
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = saved.get("init_r", saved["r"])
    base = str(config.base_model_name_or_path or "")
    head = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation"}
    tags = ["base_model:adapter:" + base, "lora", "transformers"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items())]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", "", "# LoRA adapter", ""]
    lines += [f"For the base model `{base}`: rank {rank}, alpha {saved['lora_alpha']:g}."]
    if starts_of(peft_model):
        lines += [
            f"It began as `{config.init_lora_weights}` of rank {config.r}. The file holds the "
            "learned change alone, of twice that rank, for the pretrained base."
        ]
    lines += ["" if metrics is None else f"\n{_training(metrics)}\n"]
    lines += [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
    ]
    lines += ["", f"base = AutoModelForCausalLM.from_pretrained({base!r})"]
    lines += ["model = PeftModel.from_pretrained(base, FOLDER)  # the folder of this file", "```"]
    write_text_atomic(folder / CARD, "\n".join(lines).encode("utf-8", "replace").decode() + "\n")


def _training(metrics: Metrics) -> str:
    """Describe the training, in sentences."""
    config = metrics["config"]
    text = (
        f"{metrics['open_modules']} of {metrics['total_modules']} layers were trained, "
        f"{metrics['trainable_parameters']:,} parameters, for {metrics['steps']} steps of "
        f"{config['batch_size']} rows a device, at a learning rate of {config['learning_rate']:g}, "
        f"seed {config['seed']}."
    )
    losses = (metrics["held_out_loss_before"], metrics["held_out_loss"])
    if losses[1] is None:
        return f"{text} No loss was measured on held-out rows."
    before, after = ("–" if loss is None else f"{loss:.3f}" for loss in losses)
    return f"{text} Loss on held-out rows: {before} → {after} nats per answer token."

"""Tune preferences with TRL's DPOTrainer, and select the layers in the middle of the run.

Run: python examples/train_with_dpo.py --model MODEL --data ROWS.jsonl --out adapter
A row has prompt, chosen and rejected.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import ila


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = ila.attach(base, lora)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=f"{options.out}/checkpoints",
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=5e-5,
            lr_scheduler_type="cosine",
            beta=0.1,
            max_length=512,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    # All layers train for a quarter of the steps; then the best 30 % go on.
    selection = ila.SelectLayers(at=0.25, top=0.3)
    trainer.add_callback(selection)
    trainer.train()
    print(f"{len(selection.mask.open)} of {len(selection.mask)} layers open")
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()

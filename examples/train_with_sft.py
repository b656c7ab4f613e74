"""Fine-tune with TRL's SFTTrainer, which makes the adapter, on our layers.

Run: python examples/train_with_sft.py --model MODEL --data ROWS.jsonl --out adapter
A row has prompt and completion, or messages. With --mask mask.json the layers of a mask train;
without, all train for a quarter of the steps, and then the best 30 %.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import ila


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mask")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    set_seed(0)
    selection = [] if options.mask else [ila.SelectLayers(at=0.25, top=0.3)]
    trainer = SFTTrainer(
        options.model,
        args=SFTConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            max_length=512,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[ila.TakeOver(options.mask), *selection],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

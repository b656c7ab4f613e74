"""Learn a mask, then train the best 30 % of the layers with transformers.Trainer.

Run: python examples/train_with_trainer.py --model MODEL --data ROWS.jsonl --out adapter
What was learned is in adapter/mask.json: cut it otherwise (ila select), compare it (ila compare).
"""

import argparse
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import ila
from ila.data import Collator, encode, load_rows, pad_token_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset, summary = encode(load_rows(options.data), tokenizer, max_length=512)
    print(summary)
    collator = Collator(pad_token_id(tokenizer))

    base = AutoModelForCausalLM.from_pretrained(options.model)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = ila.attach(base, lora)

    # 1. Which layers matter? Stage 1 trains all of them, stage 2 scores them.
    search = ila.SearchConfig(
        stage1_steps=options.steps, stage2_steps=options.steps, batch_size=4, learning_rate=1e-3
    )
    mask = ila.learn_mask(model, dataset, search, collator=collator)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    mask.save(options.out)  # the scores cost hours on a large model

    # 2. Start again from the base weights, with only those layers open.
    set_seed(0)
    model = ila.attach(model.unload(), lora)
    print(ila.apply_mask(model, mask.top(0.3)))

    # 3. Train as ever: closed layers hold no parameters, so Trainer does not see them.
    arguments = TrainingArguments(
        output_dir=f"{options.out}/checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    Trainer(model, arguments, collator, dataset).train()
    model.save_pretrained(options.out)  # a plain PEFT adapter with the open layers only


if __name__ == "__main__":
    main()

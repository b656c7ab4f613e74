r"""Train the layers that a mask file opens, with a bare PyTorch loop.

First: ila learn --model MODEL --data ROWS.jsonl --out run && ila select run --top 0.3
Then: python examples/train_with_loop.py --model MODEL --data ROWS.jsonl \
          --mask run/mask-top-0.3.json --out adapter
"""

import argparse

import torch
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import ila
from ila.data import Collator, encode, load_rows, pad_token_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--mask", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset, summary = encode(load_rows(options.data), tokenizer, max_length=512)
    print(summary)
    batches = DataLoader(
        dataset, batch_size=4, shuffle=True, collate_fn=Collator(pad_token_id(tokenizer))
    )

    base = AutoModelForCausalLM.from_pretrained(options.model).to(device)
    # The same target_modules as the mask was learned with: "all-linear" is the default there.
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = ila.attach(base, lora)
    ila.apply_mask(model, ila.LayerMask.load(options.mask))
    print(ila.explain(model))

    # Only the open layers' parameters are there to be optimised.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model.train()
    step = 0
    while step < options.steps:
        for batch in batches:
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == options.steps:
                print(f"step {step}: loss {loss.item():.3f}")
            if step == options.steps:
                break
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()

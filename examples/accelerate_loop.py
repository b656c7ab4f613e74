r"""Train with a loop over accelerate: one process or several, any precision.

Run: accelerate launch examples/accelerate_loop.py --model MODEL --data ROWS.jsonl --out adapter \
         --mask mask.json
Without --mask, one process trains all layers for a quarter of the steps, and then the best 30 %.
"""

import argparse
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import ila
from ila.data import Collator, encode, load_rows, pad_token_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mask")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=options.gradient_accumulation)
    if options.mask is None and accelerator.num_processes > 1:
        parser.error("several processes need --mask: they cannot close layers in the middle")
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dataset, summary = encode(load_rows(options.data), tokenizer, max_length=512)
    accelerator.print(summary)
    collator = Collator(pad_token_id(tokenizer))
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collator)
    scoring = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collator)

    base = AutoModelForCausalLM.from_pretrained(options.model)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = ila.attach(base, lora)
    if options.mask is not None:  # before the optimiser, and before DDP makes its buckets
        accelerator.print(ila.apply_mask(model, ila.LayerMask.load(options.mask)))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, 0, options.steps * accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    model.train()
    step, switch = 0, None if options.mask else max(1, options.steps // 4)
    for batch in chain.from_iterable(repeat(loader)):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if accelerator.sync_gradients and step == switch:
            some = islice(chain.from_iterable(repeat(scoring)), 12)
            some = [{k: v.to(accelerator.device) for k, v in one.items()} for one in some]
            mask = ila.select_layers(model, some, optimizer=optimizer.optimizer, top=0.3)
            print(f"{len(mask.open)} of {len(mask)} layers open from step {step + 1} on")
        if accelerator.sync_gradients and step % 10 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
        if step == options.steps:
            break
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""Train with LLaMA-Factory on our layers: all open, under a mask, or with a selection.

Run: python examples/train_with_llamafactory.py CONFIG.yaml --mask mask.json
 or: python examples/train_with_llamafactory.py CONFIG.yaml --select-at 0.25 --top 0.3
CONFIG.yaml is a file of `llamafactory-cli train` with finetuning_type: lora and lora_target: all.
"""

import argparse
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

import ila


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--mask")
    parser.add_argument("--select-at", type=float)
    parser.add_argument("--top", type=float, default=0.3)
    options = parser.parse_args()

    # LLaMA-Factory makes model, adapter and trainer; the callback converts the layers of the
    # adapter when the trainer is built, before there is an optimiser.
    callbacks = [ila.TakeOver(options.mask)]
    if options.select_at is not None:
        callbacks.append(ila.SelectLayers(at=options.select_at, top=options.top))
    given = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))
    # LLaMA-Factory's own checkpointing knows transformers' blocks by the function they hand over;
    # Trainer's does the same work, and leaves out the frozen blocks.
    given["gradient_checkpointing"] = not given.get("disable_gradient_checkpointing", False)
    given["disable_gradient_checkpointing"] = True
    run_exp(given, callbacks)


if __name__ == "__main__":
    main()

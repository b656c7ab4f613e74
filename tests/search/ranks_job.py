"""What one process and two must do alike: every kind of search, then training under a mask.

Run as a script: model folder, output folder, rows per process and step, what to run, training_args.
Each process writes its results beside the output folder.
"""

import json
import os
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

import ila
from ila.ranks import leave_process_group
from ila.train import TrainConfig, train

WORDS = 24


def make_model(folder, **changes):
    base = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    options = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return ila.attach(base, LoraConfig(**options | changes))


def make_rows(count=16):
    """Rows of different lengths: a mean of the processes' means would not be the batch's mean."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        first = draw.randrange(WORDS - 3)
        ids = [3 + (first + step) % (WORDS - 3) for step in range(draw.randrange(4, 13))]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def search(folder, out, size, method, training_args, *, resume=False):
    """Learn a mask; return it with the model and what the search logged."""
    model = make_model(folder)
    config = ila.SearchConfig(
        method=method,
        stage1_steps=4,
        stage2_steps=5,
        batch_size=size,
        epsilon=0.0,
        learning_rate=1e-2,
        save_every=2,
        stability_window=2,
        training_args=training_args,
    )
    mask = ila.learn_mask(model, make_rows(), config, output_dir=out, resume=resume, progress=False)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return model, {
        "scores": dict(mask.scores),
        "signal": dict(mask.provenance["signals"]["gate_gradient"]),
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in log if "loss" in entry],
    }


def selected(folder, scores):
    model = make_model(folder)
    ila.apply_mask(model, ila.LayerMask(scores).top(0.3))
    return model


def train_selected(model, out, size, training_args, *, resume=False):
    """Train what is open; return what two processes must share with one."""
    config = TrainConfig(
        steps=6, batch_size=size, learning_rate=1e-2, save_every=2, training_args=training_args
    )
    metrics = train(
        model,
        make_rows(),
        config,
        held_out=make_rows()[:5],
        output_dir=out,
        resume=resume,
        progress=False,
    )
    names = ("losses", "held_out_loss", "held_out_loss_before", "tokens_per_step", "steps")
    return {name: metrics[name] for name in (*names, "trainable_parameters")}


def count_synchronised(traffic):
    """Let ``DistributedDataParallel`` note the elements of every bucket that it reduces."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    original = DistributedDataParallel.__init__

    def noting(self, *args, **kwargs):
        original(self, *args, **kwargs)

        def hook(state, bucket):
            traffic.append(bucket.buffer().numel())
            return allreduce_hook(state, bucket)

        self.register_comm_hook(None, hook)

    DistributedDataParallel.__init__ = noting


def main(folder, out, size, methods, training_args):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    time.sleep(int(rank))  # the second process comes when the first has begun
    traffic: list[int] = []
    count_synchronised(traffic)
    results = {}
    for method in methods:
        traffic.clear()
        model, results[method] = search(folder, out / method, size, method, training_args)
        results[method]["synchronised"] = list(traffic)
    traffic.clear()
    model = selected(folder, results[methods[0]]["scores"])
    results["train"] = train_selected(model, out / "train", size, training_args)
    results["train"]["synchronised"] = list(traffic)
    # The same model again: whatever wrapped it for the search must be gone.
    traffic.clear()
    model, _ = search(folder, out / "again", size, methods[0], training_args)
    ila.apply_mask(model, ila.LayerMask(results[methods[0]]["scores"]).top(0.3))
    traffic.clear()
    results["again"] = train_selected(model, out / "again-train", size, training_args)
    results["again"]["synchronised"] = list(traffic)
    try:
        train_selected(model, out / "train", size, training_args)
    except ValueError as error:
        results["refused"] = str(error)
    Path(f"{out}-{rank}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    _, folder, out, size, methods, training_args = sys.argv
    main(folder, Path(out), int(size), json.loads(methods), json.loads(training_args))

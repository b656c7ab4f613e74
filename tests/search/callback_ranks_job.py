"""``SelectLayers`` in a Trainer of several processes, and one run that starts Trainer again.

Run as a script: folder of the tests, model folder, output folder. Each process writes its results.
"""

import gc
import hashlib
import json
import os
import runpy
import sys
import warnings
from pathlib import Path

import torch
from transformers import Trainer

import ila
from ila.price.choice import Choice
from ila.runs.processes import leave_process_group
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.training.config import TrainConfig
from ila.training.loop import default_collator, run
from ila.training.train import arguments_of

STEPS, SWITCH = 6, 3
METHOD = {"keep": "gate_gradient", "drop": "path"}


def config_of(clipping, accumulation=1):
    more = {"max_grad_norm": clipping, "gradient_accumulation_steps": accumulation}
    return TrainConfig(
        steps=STEPS, batch_size=2, learning_rate=1e-2, save_every=2, training_args=more
    )


def bits(model):
    """A digest of the adapter's bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def callback(tools, folder, out, config, resume=None, **options):
    """A run of Trainer with ``SelectLayers``, or without it."""
    model = tools["make_model"](folder)
    chosen = ila.SelectLayers(at=SWITCH, **options) if options else None
    trainer = Trainer(
        model,
        arguments_of(config, out, keep=True),
        default_collator(model),
        tools["make_rows"](),
        callbacks=[] if chosen is None else [chosen],
    )
    run(trainer, resume)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [[entry["step"], entry["loss"]] for entry in log],
        "norms": [entry["grad_norm"] for entry in log],
        "bits": bits(model),
        "open": None if chosen is None else list(chosen.mask.open),
        "scores": None if chosen is None else dict(chosen.mask.scores),
        "states": len(trainer.optimizer.state),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def again(tools, folder, out, config, closed):
    """The same selection where the open layers get a Trainer of their own."""
    model, rows = tools["make_model"](folder), tools["make_rows"]()
    selection = Selection(Choice(blocks=1), at=SWITCH, closed=closed)
    metrics, mask = train_and_select(model, rows, config, selection, output_dir=out, progress=False)
    return {"losses": metrics["losses"], "bits": bits(model), "open": list(mask.open)}


def main(tests, folder, out):
    tools = runpy.run_path(str(Path(tests) / "ranks_job.py"))
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # A checkpoint of dropped layers has none of their adapters to load.
    warnings.filterwarnings("ignore", message="Found missing adapter keys")
    torch.set_num_threads(1)
    gc.freeze()
    traffic: list[int] = []
    tools["count_synchronised"](traffic)
    results = {}

    def note(name, run, *arguments, **options):
        traffic.clear()
        results[name] = run(tools, folder, out / name, *arguments, **options)
        results[name]["synchronised"] = list(traffic)

    for clipping in (0.01, 0.0):
        config = config_of(clipping)
        note(f"{clipping} all", callback, config)
        for closed in ("keep", "drop"):
            name = f"{clipping} {closed}"
            note(f"{name} callback", callback, config, blocks=1, closed=closed)
            note(f"{name} again", again, config, closed)
            checkpoint = out / f"{name} callback" / f"checkpoint-{SWITCH + 1}"
            options = {"blocks": 1, "closed": closed, "resume": checkpoint}
            note(f"{name} resumed", callback, config, **options)
            options = {"top": 0.3, "closed": closed, "method": METHOD[closed], "batches": 5}
            note(f"{name} scored", callback, config, **options)
    note("accumulated", callback, config_of(1.0, 2), top=0.3)
    Path(f"{out}-{os.environ['RANK']}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

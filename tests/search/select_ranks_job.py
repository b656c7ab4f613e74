"""One run with a selection, on one process or several; each writes what it found.

Run as a script: folder of the tests, model folder, output folder, rows per process and step,
training_args.
"""

import gc
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
from ila.training.train import arguments_of

STEPS, SWITCH = 6, 3


def one_run(tools, folder, out, size, training_args, *, closed, method, resume=False):
    """Losses and the mask of one run."""
    model = tools["make_model"](folder)
    rows = tools["make_rows"]()
    config = TrainConfig(
        steps=STEPS, batch_size=size, learning_rate=1e-2, save_every=2, training_args=training_args
    )
    selection = Selection(Choice(top=0.3), at=SWITCH, closed=closed, method=method, batches=5)
    metrics, mask = train_and_select(
        *(model, rows, config, selection),
        held_out=rows[:5],
        output_dir=out,
        resume=resume,
        progress=False,
    )
    names = ("losses", "held_out_loss", "held_out_loss_before", "steps", "trainable_parameters")
    found = {name: metrics[name] for name in (*names, "tokens_per_step")}
    return found | {"open": list(mask.open), "scores": dict(mask.scores)}


def refused(tools, folder, out, training_args):
    """What ``SelectLayers`` says where it cannot close layers."""
    model = tools["make_model"](folder)
    config = TrainConfig(steps=STEPS, batch_size=2, training_args=training_args)
    trainer = Trainer(
        model,
        arguments_of(config, out, keep=False),
        ila.training.loop.default_collator(model),
        tools["make_rows"](),
        callbacks=[ila.SelectLayers(at=SWITCH, top=0.3)],
    )
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return None


def main(tests, folder, out, size, training_args):
    tools = runpy.run_path(str(Path(tests) / "ranks_job.py"))
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(1)
    gc.freeze()
    traffic: list[int] = []
    tools["count_synchronised"](traffic)
    results = {}
    for closed, method in (("keep", "gate_gradient"), ("drop", "path")):
        traffic.clear()
        options = {"closed": closed, "method": method}
        name = f"{closed}-{method}"
        results[name] = one_run(tools, folder, out / name, size, training_args, **options)
        results[name]["synchronised"] = list(traffic)
        for call, owner in ((SWITCH + 2, "training_step"), (2, "_save_checkpoint")):
            broken = out / f"broken-{owner}-{name}"

            def run(resume=False, broken=broken, options=options):
                return one_run(tools, folder, broken, size, training_args, **options, resume=resume)

            tools["broken_off"](owner, call, run)
            results[f"resumed-{owner}-{name}"] = run(resume=True)
    results["refused"] = refused(tools, folder, out / "callback", training_args)
    Path(f"{out}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    _, tests, folder, out, size, training_args = sys.argv
    main(tests, folder, Path(out), int(size), json.loads(training_args))

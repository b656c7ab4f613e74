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
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

import ila
from ila.price.choice import Choice
from ila.runs.processes import leave_process_group
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.training.config import TrainConfig
from ila.training.train import arguments_of

STEPS, SWITCH = 6, 3
KINDS = {"keep-gate_gradient": ("keep", "gate_gradient"), "drop-path": ("drop", "path")}
# In the second part; before the checkpoint of the switch; after it, when all layers have trained.
BREAKS = (
    (SWITCH + 2, Trainer, "training_step"),
    (2, Trainer, "_save_checkpoint"),
    (1, Selection, "choose"),
)


class Moments(TrainerCallback):
    """Notes AdamW's first moments by name: after each step, and before the next one."""

    def __init__(self):
        self.before: dict[int, dict[str, float]] = {}
        self.after: dict[int, dict[str, float]] = {}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before[state.global_step] = self.read(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after[state.global_step] = self.read(model, optimizer)
        if state.global_step == STEPS:
            gc.collect()
            alive = [o for o in gc.get_objects() if type(o) is torch.optim.AdamW]
            self.states = sum(len(o.state) for o in alive)

    def read(self, model, optimizer):
        names = {p: name for name, p in model.named_parameters()}
        found = {}
        for parameter, entry in optimizer.state.items():
            moment = entry["exp_avg"]
            moment = moment.full_tensor() if isinstance(moment, DTensor) else moment
            found[names[parameter]] = moment.double().norm().item()
        return found

    def at_switch(self):
        """What the last step of all layers left, what the next one found, how many lived then."""
        return {
            "left": self.after[SWITCH],
            "found": self.before[SWITCH],
            "states": self.states,
        }


def count_shards(traffic):
    """Let FSDP2 note, for each step, the sizes that it gathers and the elements that it reduces."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    def count(owner, kind, which):
        original = owner.__call__

        def noting(self, output_tensor, input_tensor, *args, **kwargs):
            if traffic:
                traffic[-1][kind].append((output_tensor, input_tensor)[which].numel())
            return original(self, output_tensor, input_tensor, *args, **kwargs)

        owner.__call__ = noting

    count(collectives.DefaultAllGather, "gathered", 0)
    count(collectives.DefaultReduceScatter, "reduced", 1)
    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        traffic.append({"gathered": [], "reduced": []})
        return original(self, *args, **kwargs)

    Trainer.training_step = training_step


def blocks_of(model):
    """Sizes of the blocks that FSDP2 gathers, and of the largest part beside them."""
    base = model.get_base_model()
    beside = [*base.model.embed_tokens.parameters(), *base.lm_head.parameters()]
    beside += base.model.norm.parameters()
    blocks = [sum(p.numel() for p in block.parameters()) for block in base.model.layers]
    return sorted(blocks), sum(p.numel() for p in beside)


def one_run(
    tools, folder, out, size, training_args, *, closed, method, resume=False, cache_prefix=False
):
    """Losses and the mask of one run."""
    model = tools["make_model"](folder)
    rows = tools["make_rows"]()
    config = TrainConfig(
        steps=STEPS,
        batch_size=size,
        learning_rate=1e-2,
        save_every=2,
        training_args=training_args,
        cache_prefix=cache_prefix,
    )
    selection = Selection(Choice(top=0.3), at=SWITCH, closed=closed, method=method, batches=5)
    moments = Moments()
    metrics, mask = train_and_select(
        *(model, rows, config, selection),
        held_out=rows[:5],
        output_dir=out,
        resume=resume,
        progress=False,
        callbacks=[moments],
    )
    names = ("losses", "held_out_loss", "held_out_loss_before", "steps", "trainable_parameters")
    found = {name: metrics[name] for name in (*names, "tokens_per_step")}
    found |= {"open": list(mask.open), "scores": dict(mask.scores)}
    saved = load_file(out / "adapter_model.safetensors")
    found["saved"] = {name: tensor.double().norm().item() for name, tensor in saved.items()}
    return found if resume else found | {"moments": moments.at_switch()}


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


def reopened(tools, folder, out, size, training_args, scores, shards):
    """Loss of a batch and sizes that FSDP2 gathers: all layers, some dropped, all again."""
    model, _ = tools["search"](folder, out, size, "gate_gradient", training_args)
    batch = ila.training.loop.default_collator(model)(tools["make_rows"]()[:2])
    mask, found = ila.LayerMask(scores), {}
    for name, change in (
        ("all", lambda: None),
        ("dropped", lambda: ila.apply_mask(model, mask.top(0.3))),
        ("kept", lambda: ila.apply_mask(model, mask.top(0.3), closed="keep")),
        ("opened", lambda: ila.apply_mask(model, mask)),
        ("dropped again", lambda: ila.apply_mask(model, mask.top(0.3))),
        ("restored", lambda: ila.restore(model)),
    ):
        change()
        shards.append({"gathered": [], "reduced": []})
        with torch.no_grad():
            loss = float(model(**batch).loss)
        found[name] = {"loss": loss, "gathered": sorted(set(shards[-1]["gathered"]))}
    return found


def main(tests, folder, out, size, training_args):
    tools = runpy.run_path(str(Path(tests) / "ranks_job.py"))
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(1)
    gc.freeze()
    traffic: list[int] = []
    tools["count_synchronised"](traffic)
    shards: list[dict] = []
    if "fsdp" in training_args:
        count_shards(shards)
    results = {}
    for name, (closed, method) in KINDS.items():
        traffic.clear()
        shards.clear()
        options = {"closed": closed, "method": method}
        results[name] = one_run(tools, folder, out / name, size, training_args, **options)
        results[name] |= {"synchronised": list(traffic), "shards": list(shards)}
        for call, owner, place in BREAKS:
            broken = out / f"broken-{place}-{name}"

            def run(resume=False, broken=broken, options=options):
                return one_run(tools, folder, broken, size, training_args, **options, resume=resume)

            tools["broken_off"](place, call, run, owner=owner)
            results[f"resumed-{place}-{name}"] = run(resume=True)
    if shards:
        arguments = (tools, folder, out / "reopened", size, training_args)
        results["reopened"] = reopened(*arguments, results["drop-path"]["scores"], shards)
        arguments = (tools, folder, out / "cached", size, training_args)
        try:
            one_run(*arguments, closed="keep", method="path", cache_prefix=True)
        except ValueError as error:
            results["refused cache"] = str(error)
    results["refused"] = refused(tools, folder, out / "callback", training_args)
    Path(f"{out}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    _, tests, folder, out, size, training_args = sys.argv
    main(tests, folder, Path(out), int(size), json.loads(training_args))

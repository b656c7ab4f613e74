"""What one process and two must do alike: every kind of search, then training under a mask.

Run as a script: model folder, output folder, rows per process and step, what to run, training_args.
Each process writes its results beside the output folder.
"""

import gc
import json
import os
import random
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from transformers import LlamaForCausalLM, Trainer

import ila
from ila.models.layer import MaskedLoraLinear
from ila.runs.processes import leave_process_group
from ila.training.config import TrainConfig
from ila.training.train import train

WORDS = 24


TOLERANCE = 1e-5  # fp32: the same sums, added in another order


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


def search(folder, out, size, method, training_args, *, resume=False, **changes):
    """Learn a mask; return it with the model and what the search logged."""
    model = make_model(folder, **changes)
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


class BrokenOffError(BaseException):
    """What a kill looks like from inside."""


def broken_off(name, call, run, *, after=False, owner=Trainer):
    """Run until the given call of a method, before or after its work."""
    original, calls = getattr(owner, name), 0

    def breaking(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls < call:
            return original(self, *args, **kwargs)
        if after:
            original(self, *args, **kwargs)
        raise BrokenOffError

    setattr(owner, name, breaking)
    try:
        run()
    except BrokenOffError:
        return
    finally:
        setattr(owner, name, original)
    raise AssertionError(f"{name} was not called {call} times")


def resumed(folder, out, size, methods, training_args, scores):
    """Searches and a training, each broken off at several points; what they end with."""
    options = (size, methods[0], training_args)
    broken_off("training_step", 3, lambda: search(folder, out / "broken", *options))
    for name, call, after in (("train", 1, True), ("training_step", 4, False), ("train", 1, True)):
        again = partial(search, folder, out / "broken", *options, resume=True)
        broken_off(name, call, again, after=after)
    _, ended = again()
    options = (out / "broken-train", size, training_args)
    broken_off("training_step", 5, lambda: train_selected(selected(folder, scores), *options))
    trained = train_selected(selected(folder, scores), *options, resume=True)
    return {"search": ended, "train": trained}


def note_gradients(noted):
    """Let ``Trainer`` note, step by step, what kinds of parameters have a gradient."""
    original = Trainer.training_step

    def noting(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        graded = (name for name, p in self.model.named_parameters() if p.grad is not None)
        noted.append(sorted({name.split(".lora_")[-1].split(".")[0] for name in graded}))
        return loss

    Trainer.training_step = noting


def count_paths(paths):
    """Let every layer note whether it ran fused or as PEFT's."""

    def count(path, owner, name):
        original = getattr(owner, name)

        def noting(self, *args, **kwargs):
            paths[path] += 1
            return original(self, *args, **kwargs)

        setattr(owner, name, noting)

    count("fused", MaskedLoraLinear, "_operands")
    count("peft", Linear, "forward")


def main(folder, out, size, methods, training_args):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(1)
    gc.freeze()  # each training collects garbage, over all modules imported
    rank = os.environ.get("RANK", "0")
    time.sleep(int(rank))  # the second process comes when the first has begun
    traffic: list[int] = []
    count_synchronised(traffic)
    graded: list[list[str]] = []
    note_gradients(graded)
    paths = Counter()
    count_paths(paths)
    results = {}
    for method in methods:
        traffic.clear()
        graded.clear()
        _, results[method] = search(folder, out / method, size, method, training_args)
        results[method] |= {"synchronised": list(traffic), "graded": list(graded)}
    traffic.clear()
    paths.clear()
    model = selected(folder, results[methods[0]]["scores"])
    results["train"] = train_selected(model, out / "train", size, training_args)
    results["train"] |= {"synchronised": list(traffic), "paths": dict(paths)}
    scores = results[methods[0]]["scores"]
    if "fsdp" in training_args:
        try:
            ila.apply_mask(model, ila.LayerMask(scores))
        except RuntimeError as error:
            results["refused to open"] = str(error)
    results["resumed"] = resumed(folder, out, size, methods, training_args, scores)
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
    if "fsdp" in training_args:
        model, _ = search(folder, out / "thin", size, "path", training_args, r=1)
        try:
            train_selected(model, out / "thin-train", size, training_args)
        except ValueError as error:
            results["refused thin"] = str(error)
    Path(f"{out}-{rank}.json").write_text(json.dumps(results))
    leave_process_group()


def close(found, expected):
    """Whether numbers of one kind agree; those that cancel are held to the largest of them."""
    largest = max(map(abs, expected))
    pairs = zip(found, expected, strict=True)
    return all(abs(a - b) <= TOLERANCE * max(abs(b), largest) for a, b in pairs)


def check_search(found, expected):
    """Assert that two searches had the same course and the same end."""
    assert close(found["losses"], expected["losses"])
    assert close(found["norms"], expected["norms"])
    for kind in ("scores", "signal"):
        assert list(found[kind]) == list(expected[kind])
        assert close(list(found[kind].values()), list(expected[kind].values()))
    masks = [ila.LayerMask(result["scores"]).top(0.3) for result in (found, expected)]
    assert masks[0].open == masks[1].open


def check_training(found, expected):
    """Assert that two trainings had the same losses, before, during and after."""
    assert [step for step, _ in found["losses"]] == [step for step, _ in expected["losses"]]
    assert close([x for _, x in found["losses"]], [x for _, x in expected["losses"]])
    for name in ("held_out_loss", "held_out_loss_before"):
        assert close([found[name]], [expected[name]])
    for name in ("steps", "tokens_per_step", "trainable_parameters"):
        assert found[name] == expected[name]


def check_as_one(results, folder, out):
    """Assert that what two processes found is what this one finds with all of each batch."""
    methods = [name for name in ("path", "ila", "gate_gradient") if name in results]
    for method in methods:
        _, expected = search(folder, out / method, 4, method, {})
        check_search(results[method], expected)
    model = selected(folder, results[methods[0]]["scores"])
    check_training(results["train"], train_selected(model, out / "train", 4, {}))


def check_resumed(results):
    """Assert that runs broken off and resumed ended with the bits of those that were not."""
    for name, found in results["resumed"]["search"].items():
        assert found == results["path"][name], name
    for name, found in results["resumed"]["train"].items():
        assert found == results["train"][name], name


if __name__ == "__main__":
    _, folder, out, size, methods, training_args = sys.argv
    main(folder, Path(out), int(size), json.loads(methods), json.loads(training_args))

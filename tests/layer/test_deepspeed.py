"""DeepSpeed's engine on two CPU processes: losses of one, and ``explain`` tells the path taken.

Not through Trainer: accelerate starts DeepSpeed on no CPU.
"""

import json
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

TRAIN = """
import json, os, sys
from collections import Counter
from pathlib import Path
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from transformers import LlamaForCausalLM
import ila
from ila.models.layer import MaskedLoraLinear
from ila.models.edit import masked_layers
from ila.runs.processes import leave_process_group

paths = Counter()
for path, owner, name in (("eager", MaskedLoraLinear, "_operands"), ("peft", Linear, "forward")):
    def noting(self, *args, path=path, original=getattr(owner, name), **kwargs):
        paths[path] += 1
        return original(self, *args, **kwargs)
    setattr(owner, name, noting)


def losses(folder, stage, ids):
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    model = ila.attach(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = masked_layers(model, "default")
    ila.apply_mask(model, ila.LayerMask({n: float(i) for i, n in enumerate(names)}).top(0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = None
    if stage:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        options = {"train_micro_batch_size_per_gpu": len(ids), "zero_optimization": zero}
        options |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    found = []
    paths.clear()
    for _ in range(4):
        loss = (engine or model.train())(input_ids=ids, labels=ids).loss
        mean = loss.detach().clone()
        if engine:
            engine.backward(loss)
            engine.step()
            torch.distributed.all_reduce(mean)
            mean /= 2
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(mean.item())
    explained = ila.explain(model).paths()
    explained.pop("bare")
    assert explained == {path: count // 4 for path, count in paths.items()}, (explained, paths)
    return {"losses": found, "paths": dict(paths)}


torch.set_num_threads(1)
folder, out = sys.argv[1:]
rank = int(os.environ["RANK"])
deepspeed.init_distributed("gloo")
ids = torch.arange(32).view(4, 8).mul(5).remainder(46) + 3
found = {"one": losses(folder, 0, ids)}
found |= {f"zero {stage}": losses(folder, stage, ids.chunk(2)[rank]) for stage in (2, 3)}
Path(f"{out}-{rank}.json").write_text(json.dumps(found))
leave_process_group()
"""


def test_zero_reaches_the_losses_of_one_process(run_ranks, tiny_model_folder, tmp_path):
    run_ranks(TRAIN, tiny_model_folder, tmp_path / "two")
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other
    for stage in (2, 3):
        assert two[f"zero {stage}"]["losses"] == pytest.approx(two["one"]["losses"], rel=1e-5)
    # ZeRO-3 brings weights in by hooks of every module, which PEFT's forward runs and the op not.
    assert [two[f"zero {stage}"]["paths"] for stage in (2, 3)] == [{"eager": 28}, {"peft": 28}]
    assert two["one"]["losses"][0] != two["one"]["losses"][-1]

"""DDP over packed bases: two processes with half the batch each are one with all of it."""

import json
import runpy

import pytest

pytest.importorskip("bitsandbytes")

JOB = """
import json, os, sys
from pathlib import Path
import torch
from peft import LoraConfig
import ila
from ila.models.loading import find_source, load_model
from ila.runs.processes import leave_process_group, processes
from ila.training.config import TrainConfig
from ila.training.train import train

ROWS = [{"input_ids": [1, 6 + i, 9 + i, *range(8, 8 + i), 2]} for i in range(8)]
ROWS = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in ROWS]


def run(folder, load_in, size):
    base = load_model(find_source(folder), load_in=load_in, device=processes().device)
    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = ila.attach(base, lora)
    shared = {"batch_size": size, "learning_rate": 1e-2, "save_every": None}
    config = ila.SearchConfig(stage1_steps=4, stage2_steps=5, epsilon=0.0, **shared)
    mask = ila.learn_mask(model, ROWS, config, progress=False)
    ila.apply_mask(model, mask.top(0.3))
    metrics = train(model, ROWS, TrainConfig(steps=4, **shared), progress=False)
    return {"scores": dict(mask.scores), "losses": [loss for _, loss in metrics["losses"]]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out = sys.argv[1:]
    result = {load_in: run(folder, load_in, 2) for load_in in ("4bit", "8bit")}
    Path(f"{out}-{os.environ['RANK']}.json").write_text(json.dumps(result))
    leave_process_group()
"""


def test_two_processes_over_a_packed_base_are_one(run_ranks, tiny_model_folder, tmp_path):
    run_ranks(JOB, tiny_model_folder, tmp_path / "two")
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other  # the same bits on both
    (tmp_path / "job.py").write_text(JOB)
    run = runpy.run_path(str(tmp_path / "job.py"))["run"]
    for load_in, found in two.items():
        expected = run(str(tiny_model_folder), load_in, 4)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        largest = max(map(abs, expected["scores"].values()))
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5, abs=1e-5 * largest)

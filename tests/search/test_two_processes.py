"""Two processes share one output folder: one of them owns it, and both end the same way."""

import json

SEARCH_AND_TRAIN = """
import os, sys, time
from pathlib import Path
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
import ila
from ila.ranks import leave_process_group
from ila.train import TrainConfig, train

folder, out = sys.argv[1], Path(sys.argv[2])
time.sleep(int(os.environ["RANK"]))  # the second process comes when the first has begun
set_seed(0)
base = AutoModelForCausalLM.from_pretrained(folder)
lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
model = ila.attach(base, lora)
rows = [{"input_ids": [1, 6 + i, 9, 2], "labels": [-100, 6 + i, 9, 2]} for i in range(8)]
search = ila.SearchConfig(stage1_steps=2, stage2_steps=5, batch_size=2, save_every=None)
mask = ila.learn_mask(model, rows, search, output_dir=out / "search", progress=False)
(out / f"scores-{os.environ['RANK']}.json").write_text(str(dict(mask.scores)))
ila.apply_mask(model, mask.top(0.5))
config = TrainConfig(steps=2, batch_size=2, save_every=None)
train(model, rows, config, held_out=rows, output_dir=out / "train", progress=False)
try:
    train(model, rows, config, output_dir=out / "train", progress=False)
except ValueError as error:
    assert "holds a run already" in str(error)
else:
    raise AssertionError("a folder in use was taken")
leave_process_group()
"""


def test_two_processes_search_and_train_into_one_folder(tiny_model_folder, tmp_path, run_ranks):
    run_ranks(SEARCH_AND_TRAIN, tiny_model_folder, tmp_path)
    scores = [(tmp_path / f"scores-{rank}.json").read_text() for rank in range(2)]
    assert scores[0] == scores[1]
    metrics = json.loads((tmp_path / "train" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 2
    assert metrics["tokens_per_step"] == 2 * 2 * 4  # processes, rows of each, tokens of a row

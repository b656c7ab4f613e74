"""Two processes train on the hidden states that one of them computed."""

import json

import pytest

TRAIN_TWICE = """
import sys
from pathlib import Path
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
import ila
from ila.models.edit import masked_layers
from ila.runs.processes import leave_process_group
from ila.training.config import TrainConfig
from ila.training.train import train

folder, out = sys.argv[1], Path(sys.argv[2])
rows = [{"input_ids": [1, 6 + i, 9, 2], "labels": [-100, 6 + i, 9, 2]} for i in range(8)]
for cached in (False, True):
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = ila.attach(base, lora)
    names = masked_layers(model, "default")
    ila.apply_mask(model, ila.LayerMask(dict.fromkeys(names, 0.0), {n: ".1." in n for n in names}))
    config = TrainConfig(steps=3, batch_size=2, save_every=None, cache_prefix=cached)
    train(model, rows, config, output_dir=out / f"cached-{cached}", progress=False)
leave_process_group()
"""


def test_two_processes_train_on_states_that_one_computed(tiny_model_folder, tmp_path, run_ranks):
    run_ranks(TRAIN_TWICE, tiny_model_folder, tmp_path)
    plain, cached = (
        json.loads((tmp_path / f"cached-{on}" / "metrics.json").read_text()) for on in (False, True)
    )
    assert plain["prefix_cache"] is None and cached["prefix_cache"]["blocks"] == 1
    # Rows of one length: the same products, so the same losses but for a rounding or two.
    for (_, one), (_, other) in zip(plain["losses"], cached["losses"], strict=True):
        assert one == pytest.approx(other, rel=4 * 2**-23)

"""FSDP2, two processes with half of each weight: losses, scores and masks of one, fused kernels."""

import json
import runpy
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

from ila.data.encoding import Collator
from ila.training.loop import held_out_loss

JOB = Path(__file__).with_name("ranks_job.py")
METHODS = ["path", "ila"]
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}

# accelerate has a list of the kinds of device that may use FSDP, and the CPU is not on it. All that
# comes after, here and in torch, works on CPUs.
FSDP_ON_CPUS = """
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__

def with_cpus(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = with_cpus
"""


def test_two_processes_with_sharded_weights_are_one(run_ranks, tiny_model_folder, tmp_path):
    options = (2, json.dumps(METHODS), json.dumps(FSDP))
    script = FSDP_ON_CPUS + JOB.read_text("utf-8")
    run_ranks(script, tiny_model_folder, tmp_path / "two", *options)
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other  # the same bits on both
    assert two["train"]["synchronised"] == []  # it was not DDP
    # Six steps, and two of the three held-out batches before and after, on four open layers.
    assert two["train"]["paths"] == {"fused": (6 + 2 + 2) * 4}
    for method in METHODS:
        assert two[method]["graded"] == [["A", "B"]] * 4 + [["S"]] * 5
    assert "closed before the model was sharded" in two["refused to open"]
    assert "more processes than some parameters have rows" in two["refused thin"]

    job = runpy.run_path(str(JOB))
    job["check_resumed"](two)
    job["check_as_one"](two, tiny_model_folder, tmp_path / "one")

    # The adapter that two processes held in halves is one file that plain PEFT reads.
    plain = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "two" / "train"))
    loss = held_out_loss(plain, job["make_rows"]()[:5], Collator(0), 2)
    assert loss == pytest.approx(two["train"]["held_out_loss"], rel=1e-6)

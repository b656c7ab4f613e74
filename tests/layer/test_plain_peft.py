"""What this library saves is a PEFT adapter: PEFT reads it where this library is not installed."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import ila

READER = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ila", "ila_kernels"):
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocked())
for name in ("ila", "ila_kernels"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} could be imported")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, ids, out = sys.argv[1:]
dtype = torch.load(ids)["dtype"]
model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
model = PeftModel.from_pretrained(model, adapter)
ids = torch.load(ids)["ids"]
with torch.no_grad():
    logits = model(ids).logits
    with model.disable_adapter():
        without = model(ids).logits
kinds = sorted({type(m).__module__ for n, m in model.named_modules() if hasattr(m, "lora_A")})
count = sum(hasattr(m, "lora_A") for m in model.modules())
torch.save({"logits": logits, "without": without, "kinds": kinds, "count": count}, out)
assert not any(name.partition(".")[0] in ("ila", "ila_kernels") for name in sys.modules)
"""


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_adapter_trained_with_a_mask_loads_in_plain_peft(tiny, tmp_path, family):
    tiny.base(family).save_pretrained(tmp_path / "base")
    config = tiny.config(target_modules="all-linear", rank_pattern={"v_proj": 3})
    model = tiny.attached(config, tiny.base(family))
    mask = tiny.mask(model, lambda i, name: i % 3 == 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tiny.tokens()
    losses = []
    for step in range(4):
        if step == 2:
            ila.apply_mask(model, mask, optimizer=optimizer)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[3] < losses[2]
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = model(ids).logits

    torch.save({"ids": ids, "dtype": torch.float64}, tmp_path / "ids.pt")
    names = ("base", "adapter", "ids.pt", "out.pt")
    run = subprocess.run(
        [sys.executable, "-c", READER, *(str(tmp_path / name) for name in names)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    read = torch.load(tmp_path / "out.pt")
    assert read["kinds"] == ["peft.tuners.lora.layer"]
    assert read["count"] == len(mask.open)
    # Another process: its tensors lie elsewhere in memory, and a BLAS may round by alignment.
    bound = {"rtol": 0, "atol": 1e-12 * logits.abs().max().item()}
    assert torch.allclose(read["logits"], logits, **bound)
    assert (read["logits"] - read["without"]).abs().max() > 1e-2
    assert torch.allclose(read["without"], tiny.base(family)(ids).logits, **bound)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(mask.open)

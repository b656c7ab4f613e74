"""The prefix cache together with packed bases, full training and sharded weights: exact, or not."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import ila
from ila.models.blocks import find_blocks
from ila.models.edit import masked_layers
from ila.models.loading import find_source, load_model
from ila.models.open_weights import open_layers
from ila.prefix.frozen_prefix import Prefix
from ila.training.config import TrainConfig
from ila.training.train import train

# Rows of one length: the same products, so the same losses but for a rounding or two.
ROWS = [
    {"input_ids": [1, 6 + i, 9, 7 + i, 2], "labels": [-100, 6 + i, 9, 7 + i, 2]} for i in range(8)
]
SAME = 4 * 2**-23


def attached(folder, load_in=None):
    torch.manual_seed(5)
    base = load_model(find_source(str(folder)), load_in=load_in)
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return ila.attach(base, lora)


def upper_block(model):
    names = masked_layers(model, "default")
    return ila.LayerMask(dict.fromkeys(names, 0.0), {n: ".layers.1." in n for n in names})


def trained(model, cached):
    config = TrainConfig(
        steps=6, batch_size=2, learning_rate=1e-2, save_every=None, cache_prefix=cached
    )
    metrics = train(model, ROWS, config, held_out=ROWS[:3], progress=False)
    assert (metrics["prefix_cache"] is not None) == cached
    assert not cached or metrics["prefix_cache"]["blocks"] == 1
    return [*(loss for _, loss in metrics["losses"]), metrics["held_out_loss"]]


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_packed_prefix_is_cached_exactly(load_in, tiny_model_folder):
    pytest.importorskip("bitsandbytes")
    found = []
    for cached in (False, True):
        model = attached(tiny_model_folder, load_in)
        ila.apply_mask(model, upper_block(model))
        found.append(trained(model, cached))
    assert found[1] == pytest.approx(found[0], rel=SAME)
    assert found[0][0] != found[0][-2]


def test_int8_on_a_gpu_is_refused_where_a_row_depends_on_the_others(tiny_model_folder):
    pytest.importorskip("bitsandbytes")
    model = attached(tiny_model_folder, "8bit")
    ila.apply_mask(model, upper_block(model))
    layer = find_blocks(model).layers[0].mlp.down_proj.base_layer
    assert Prefix.of(model, torch.no_grad).depth == 1
    layer._parameters["weight"] = torch.empty(1, device="meta")  # any device but the CPU
    with pytest.raises(ValueError, match="depend on its company"):
        Prefix.of(model, torch.no_grad)
    layer.state.threshold = 0.0
    assert Prefix.of(model, torch.no_grad).depth == 1


def test_full_training_reads_cached_states(tiny_model_folder):
    found = []
    for cached in (False, True):
        model = attached(tiny_model_folder)
        found.append(trained(open_layers(model, upper_block(model)), cached))
    assert found[1] == pytest.approx(found[0], rel=SAME)
    assert found[0][0] != found[0][-2]


SHARDED = """
import json, sys
from collections import Counter
from pathlib import Path
import ila
from ila.models.layer import MaskedLoraLinear
from ila.runs.processes import leave_process_group
from peft.tuners.lora.layer import Linear

folder, out = sys.argv[1], Path(sys.argv[2])
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
paths = Counter()
for path, owner, name in (("eager", MaskedLoraLinear, "_operands"), ("peft", Linear, "forward")):
    def noting(self, *args, path=path, original=getattr(owner, name), **kwargs):
        paths[path] += 1
        return original(self, *args, **kwargs)
    setattr(owner, name, noting)

result = {}
for cached in (False, True):
    model = attached(folder)
    ila.apply_mask(model, upper_block(model))
    before = [(row.module, row.path, row.saved_bytes) for row in ila.explain(model)]
    options = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "save_every": None}
    config = TrainConfig(**options, cache_prefix=cached, training_args=FSDP)
    metrics = train(model, ROWS, config, output_dir=out / f"cached-{cached}", progress=False)
    result[f"cached {cached}"] = metrics["losses"]
    found = ila.explain(model)
    after = [(row.module, row.path, row.saved_bytes) for row in found]
    assert after == before, [p for p in zip(before, after) if p[0] != p[1]]
    assert {row.why.split(";")[0] for row in found if row.open} == {
        "plain LoRA on nn.Linear, gathered by FSDP before it runs"}
    assert {path for path, _ in found.mlps.values()} == {"lean"}
    result["explained"] = found.paths()
paths.clear()
rows = [{name: torch.tensor([v]) for name, v in row.items()} for row in ROWS[:1]]
model.train()(**rows[0])
result["ran"] = dict(paths)
for name, training_args, what in (
    ("again", {}, model),
    ("mixed", {"bf16": True}, attached(folder)),
):
    if name == "mixed":
        ila.apply_mask(what, upper_block(what))
    config = TrainConfig(**options, cache_prefix=True, training_args=FSDP | training_args)
    try:
        train(what, ROWS, config, progress=False)
    except ValueError as error:
        result[name] = str(error)
print(json.dumps(result))
Path(f"{out}-{__import__('os').environ['RANK']}.json").write_text(json.dumps(result))
leave_process_group()
"""


def test_sharded_training_reads_cached_states_and_is_explained(
    run_ranks, tiny_model_folder, tmp_path
):
    on_cpus = runpy.run_path(str(Path(__file__).with_name("test_fsdp.py")))["FSDP_ON_CPUS"]
    here = Path(__file__).read_text("utf-8")
    shared = here[: here.index("def trained(")]
    run_ranks(on_cpus + shared + SHARDED, tiny_model_folder, tmp_path / "two")
    two, other = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert two == other
    for (_, one), (_, same) in zip(two["cached False"], two["cached True"], strict=True):
        assert one == pytest.approx(same, rel=SAME)
    assert two["explained"] == {"bare": 7, "eager": 7}
    assert two["ran"] == {"eager": 7}
    assert "not sharded yet" in two["again"]
    assert "in mixed precision FSDP rounds the weights" in two["mixed"]

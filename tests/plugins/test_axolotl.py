"""The plugin for axolotl: its interface as recorded, and itself where axolotl is installed."""

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "axolotl_select.yml"
installed = pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not installed")

# Parameters of BasePlugin's methods in axolotl 0.19.0, of the methods that our plugin has.
RECORDED = {
    "get_input_args": ("self",),
    "register": ("self", "cfg"),
    "post_model_load": ("self", "cfg", "model"),
    "add_callbacks_pre_trainer": ("self", "cfg", "model"),
}


def test_the_plugin_has_the_methods_that_were_recorded():
    source = (REPOSITORY / "ila/plugins/axolotl.py").read_text("utf-8")
    tree = ast.parse(source)
    (plugin,) = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    assert plugin.name == "IlaPlugin" and [ast.unparse(b) for b in plugin.bases] == ["BasePlugin"]
    methods = {
        node.name: tuple(argument.arg for argument in node.args.args)
        for node in plugin.body
        if isinstance(node, ast.FunctionDef)
    }
    assert methods == RECORDED


@installed
def test_axolotl_has_the_methods_that_were_recorded():
    from axolotl.integrations.base import BasePlugin

    found = {n: tuple(inspect.signature(getattr(BasePlugin, n)).parameters) for n in RECORDED}
    assert found == RECORDED


def test_the_example_has_known_keys():
    from ila.plugins.options import PluginOptions

    (selection,) = PluginOptions.read(yaml.safe_load(EXAMPLE.read_text("utf-8"))).callbacks()
    assert selection.selection.at == 0.25 and selection.selection.choice.top == 0.3


@pytest.fixture
def manager(monkeypatch):
    """Return axolotl's own manager of plugins, a new one."""
    from axolotl.integrations.base import PluginManager

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(PluginManager, "_instance", None)
    made = PluginManager.get_instance()
    for place in ("axolotl.loaders.model", "axolotl.loaders.adapter", "axolotl.loaders.tokenizer"):
        monkeypatch.setattr(f"{place}.PLUGIN_MANAGER", made)
    return made


def checked(**more):
    """Return the example's configuration as axolotl checks it."""
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    given = DictDefault({**yaml.safe_load(EXAMPLE.read_text("utf-8")), **more})
    prepare_plugins(given)
    return validate_config(given)


@installed
@pytest.mark.filterwarnings("ignore")
def test_axolotl_checks_our_keys_and_rests_its_kernels(manager):
    cfg = checked(ila_score="path")
    assert (cfg.ila_select_at, cfg.ila_top, cfg.ila_score) == (0.25, 0.3, "path")
    assert cfg.lora_mlp_kernel is cfg.lora_qkv_kernel is cfg.lora_o_kernel is False
    with pytest.raises(ValueError, match="lora_mlp_kernel and IlaPlugin compute the same layers"):
        checked(lora_mlp_kernel=True)
    with pytest.raises(ValueError, match="ila_tob is no option"):
        checked(ila_tob=0.3)
    with pytest.raises(ValueError, match="ila_top"):
        checked(ila_top="much")


@installed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True], ids=["selection", "mask"])
def test_axolotls_loader_gives_a_model_of_our_layers_that_trains(
    manager, tiny_model_folder, tmp_path, masked
):
    """Run axolotl's own loading; its trainer needs more packages, so transformers' trains."""
    from axolotl.loaders import ModelLoader
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

    import ila
    from ila.data import Collator

    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    names = [f"base_model.model.{n}" for n, _ in base.named_modules() if n.endswith("_proj")]
    mask = ila.LayerMask({name: float(i) for i, name in enumerate(names)}).top(0.3)
    mask.save(tmp_path / "mask.json")
    more = {"ila_mask": str(tmp_path / "mask.json"), "ila_select_at": None, "ila_top": None}
    cfg = checked(base_model=str(tiny_model_folder), **(more if masked else {}))
    cfg.update(base_model_config=str(tiny_model_folder), torch_dtype=torch.float32, device="cpu")
    cfg.device_map = {"": "cpu"}
    model, _ = ModelLoader(cfg, AutoTokenizer.from_pretrained(tiny_model_folder)).load()
    assert isinstance(model, PeftModel)
    paths = dict(ila.explain(model).paths())
    assert paths == ({"bare": 10, "eager": 4} if masked else {"eager": 14})
    rows = [{"input_ids": list(range(i, i + 9)), "labels": list(range(i, i + 9))} for i in range(9)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=8, per_device_train_batch_size=2,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    callbacks = manager.add_callbacks_pre_trainer(cfg=cfg, model=model)
    trainer = Trainer(model, arguments, Collator(0), rows, callbacks=callbacks)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < found[0]
    assert len([c for c in trainer.callback_handler.callbacks if hasattr(c, "selection")]) == (
        0 if masked else 1
    )
    trainer.save_model(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == (8 if masked else 28)

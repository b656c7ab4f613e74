"""The recipe for LLaMA-Factory: its entry point as recorded, and a run where it is installed.

LLaMA-Factory 0.9.5 asks for PEFT 0.18 and TRL 0.24. To run these tests beside a newer PEFT, install
it without dependencies, with TRL 0.24, and set DISABLE_VERSION_CHECK=1.
"""

import ast
import inspect
import json
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import LlamaForCausalLM

import ila

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "train_with_llamafactory.py"
# Parameters of the function that the recipe calls, in LLaMA-Factory 0.9.5.
RECORDED = {"llamafactory.train.tuner.run_exp": ("args", "callbacks")}


def is_there() -> bool:
    """Tell whether LLaMA-Factory is installed with the TRL that it imports."""
    try:
        return find_spec("llamafactory") is not None and version("trl").startswith("0.")
    except PackageNotFoundError:
        return False


installed = pytest.mark.skipif(not is_there(), reason="LLaMA-Factory is not installed, or its TRL")


def test_the_recipe_calls_the_function_that_was_recorded():
    tree = ast.parse(EXAMPLE.read_text("utf-8"))
    (found,) = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("llamafactory")
        for alias in node.names
    ]
    (call,) = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and "run_exp" in ast.dump(n.func)
    ]
    assert len(call.args) == len(RECORDED[found]) and not call.keywords


@installed
@pytest.mark.filterwarnings("ignore")
def test_llamafactory_has_the_function_that_was_recorded():
    from llamafactory.train.tuner import run_exp

    assert (
        tuple(inspect.signature(run_exp).parameters) == RECORDED["llamafactory.train.tuner.run_exp"]
    )


@pytest.fixture
def config(tiny_model_folder, tmp_path, monkeypatch):
    """Return a maker of a file for LLaMA-Factory, with rows beside it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = [{"instruction": f"a {c}", "input": "", "output": f"{c} b c d"} for c in "efghijklmnop"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))

    def write(name: str) -> tuple[Path, Path]:
        out = tmp_path / name
        given = {
            "model_name_or_path": str(tiny_model_folder), "stage": "sft", "do_train": True,
            "finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "template": "empty",
            "dataset": "rows", "dataset_dir": str(tmp_path), "cutoff_len": 64,
            "output_dir": str(out), "max_steps": 8, "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "use_cpu": True, "seed": 3, "plot_loss": False,
        }  # fmt: skip
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(given))
        return file, out

    return write


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@installed
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_trains_like_llamafactory_alone_and_under_a_mask(
    config, monkeypatch, tiny_model_folder, tmp_path
):
    from llamafactory.train.tuner import run_exp

    def recipe(name: str, *more: object) -> Path:
        file, out = config(name)
        monkeypatch.setattr(sys, "argv", [EXAMPLE.name, str(file), *map(str, more)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return out

    file, plain = config("plain")
    # Its own checkpointing fails in transformers 5.23; the recipe takes Trainer's.
    run_exp({**yaml.safe_load(file.read_text()), "disable_gradient_checkpointing": True})
    assert losses(recipe("ours")) == pytest.approx(losses(plain), abs=1e-4)
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    names = [f"base_model.model.{n}" for n, _ in base.named_modules() if n.endswith("_proj")]
    mask = ila.LayerMask({name: float(i) for i, name in enumerate(names)}).top(0.3)
    mask.save(tmp_path / "mask.json")
    masked = recipe("masked", "--mask", tmp_path / "mask.json")
    loaded = PeftModel.from_pretrained(base, str(masked))
    held = {n for n, m in loaded.named_modules() if "default" in getattr(m, "lora_A", ())}
    assert held == set(mask.open)
    selected = losses(recipe("selected", "--select-at", 0.5, "--top", 0.3))
    assert selected[:4] == pytest.approx(losses(plain)[:4], abs=1e-4)
    assert selected[-1] != losses(plain)[-1]

"""The examples and the README's snippets do what they say, on a model of two blocks."""

import functools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command
from typer.testing import CliRunner

import ila
from ila.cli import app
from ila.data.encoding import encode
from ila.training.arguments import arguments, check_usable
from tests.search.test_fsdp import FSDP_ON_CPUS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"question": f"{a} + {b} ?", "answer": f"= {a + b}"} for a in range(6) for b in range(4)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(REPOSITORY / "examples" / name), run_name="__main__")


def assert_plain_adapter(folder: Path, model: Path, layers: int, *, trained: bool = True) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * layers
    moved = any(tensor.abs().sum() > 0 for key, tensor in tensors.items() if "lora_B" in key)
    assert moved is trained
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder))
    targets = loaded.peft_config["default"].target_modules
    adapted = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == layers
    assert targets


# Trainer pins memory by default, which torch remarks on where there is no GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_trainer_example_trains_the_best_30_percent(
    tiny_model_folder, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    run_example(
        "train_with_trainer.py", monkeypatch, model=tiny_model_folder, data=data, out=out, steps=5
    )
    assert "4 of 14 layers open" in capsys.readouterr().out
    assert_plain_adapter(out, tiny_model_folder, 4)
    mask = ila.LayerMask.load(out)
    assert len(mask) == len(mask.open) == 14 and mask.provenance["stage1"]["steps"] == 5


def test_loop_example_trains_what_the_mask_opens(
    tiny_model_folder, data, tmp_path, monkeypatch, capsys
):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    names = [name for name, _ in base.named_modules() if name.endswith("_proj")]
    scores = {f"base_model.model.{name}": float(index) for index, name in enumerate(names)}
    ila.LayerMask(scores).top(0.5).save(tmp_path / "mask.json")
    out = tmp_path / "out"
    options = {"model": tiny_model_folder, "data": data, "out": out, "steps": 4}
    run_example("train_with_loop.py", monkeypatch, mask=tmp_path / "mask.json", **options)
    printed = capsys.readouterr().out
    assert "7 eager, 7 bare" in printed or "7 bare, 7 eager" in printed
    assert "step 4: loss" in printed
    assert_plain_adapter(out, tiny_model_folder, 7)


def mask_of(model: Path, file: Path) -> list[str]:
    """Write a mask that opens the best half of the layers; return their options."""
    base = AutoModelForCausalLM.from_pretrained(model)
    names = [name for name, _ in base.named_modules() if name.endswith("_proj")]
    scores = {f"base_model.model.{name}": float(index) for index, name in enumerate(names)}
    ila.LayerMask(scores).top(0.5).save(file)
    return ["--mask", str(file)]


@pytest.fixture
def fresh_accelerate():
    """Forget accelerate's shared state: it keeps the first script's gradient accumulation."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_accelerate_example_selects_or_takes_a_mask(
    tiny_model_folder, data, tmp_path, monkeypatch, capsys, fresh_accelerate
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"model": tiny_model_folder, "data": data, "steps": 20}
    out = tmp_path / "selected"
    accumulated = {"gradient-accumulation": 2}
    run_example("accelerate_loop.py", monkeypatch, out=out, **options, **accumulated)
    printed = capsys.readouterr().out
    assert "4 of 14 layers open from step 6 on" in printed and "step 20: loss" in printed
    assert_plain_adapter(out, tiny_model_folder, 14)  # the others keep what they learned
    mask_of(tiny_model_folder, tmp_path / "mask.json")
    masked = {"mask": tmp_path / "mask.json", "out": tmp_path / "masked"}
    run_example("accelerate_loop.py", monkeypatch, **options, **masked)
    assert "7 of 14 layers open" in capsys.readouterr().out
    assert_plain_adapter(tmp_path / "masked", tiny_model_folder, 7)


LOOP_JOB = """
import runpy, sys
sys.argv = ["accelerate_loop.py", *sys.argv[1:]]
runpy.run_path("examples/accelerate_loop.py", run_name="__main__")
"""


@pytest.mark.slow
def test_accelerate_example_runs_on_two_processes(
    run_ranks, tiny_model_folder, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    more = mask_of(tiny_model_folder, tmp_path / "mask.json")
    out = tmp_path / "out"
    run_ranks(LOOP_JOB, "--model", tiny_model_folder, "--data", data, "--out", out, *more)
    assert_plain_adapter(out, tiny_model_folder, 7)


# TRL asks transformers by names that transformers 5 is renaming.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("masked", [False, True], ids=["selection", "mask"])
def test_sft_example_trains_on_our_layers(tiny_model_folder, tmp_path, monkeypatch, masked):
    pytest.importorskip("trl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = [{"prompt": f"a b {letter}", "completion": f" {letter} a"} for letter in "cdefghij"]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": tiny_model_folder, "data": data, "out": out, "steps": 8}
    if masked:
        mask_of(tiny_model_folder, tmp_path / "mask.json")
        options["mask"] = tmp_path / "mask.json"
    run_example("train_with_sft.py", monkeypatch, **options)
    assert_plain_adapter(out, tiny_model_folder, 7 if masked else 14)


# TRL asks transformers by names that transformers 5 is renaming.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_dpo_example_selects_in_the_middle(tiny_model_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    rows = [
        {"prompt": f"a b {letter}", "chosen": f" {letter} a", "rejected": " b b"}
        for letter in "cdefghij"
    ]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": tiny_model_folder, "data": data, "out": out, "steps": 8}
    run_example("train_with_dpo.py", monkeypatch, **options)
    assert "4 of 14 layers open" in capsys.readouterr().out
    assert_plain_adapter(out, tiny_model_folder, 14)


# ---- files for --config


CONFIGS = sorted((REPOSITORY / "examples").glob("*.yaml"))


class StopError(Exception):
    """Ends a command where its settings are made."""


def commands_of(file: Path) -> list[list[str]]:
    """Return the commands in the first comment of a file, from `ila` on."""
    lines = [line[1:] for line in file.read_text("utf-8").splitlines() if line.startswith("#  ")]
    words = [shlex.split(line) for line in lines]
    return [line[line.index("ila") :] for line in words]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """Work in a folder with the examples, and with the masks that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for place in ("MASK.json", "runs/search/top-0.3.json"):
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        ila.LayerMask({"a": 1.0, "b": 0.0}).top(0.5).save(file)
    return tmp_path


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_a_file_for_config_makes_its_settings(file, clone, monkeypatch):
    made = []

    def caught(inputs, config, *args, **kwargs):
        made.append(config)
        raise StopError

    for place in ("learn.learn", "train.train_selected", "train_once.train_once"):
        monkeypatch.setattr(f"ila.commands.{place}", caught)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    commands = [command for command in commands_of(file) if command[1] != "select"]
    for command in commands:
        assert f"examples/{file.name}" in command
        result = CliRunner().invoke(app, command[1:])
        assert isinstance(result.exception, StopError), (result.output, result.exception)
    assert len(made) == len(commands) > 0
    content = yaml.safe_load(file.read_text("utf-8"))
    for config in made:
        assert config.batch_size == content["batch_size"]
        steps = getattr(config, "stage1_steps", None) or config.for_rows(64, 2).steps
        args = arguments(
            clone, steps=steps, save_every=None, extra=config.training_args,
            learning_rate=config.learning_rate,
        )  # fmt: skip
        check_usable(args, config.training_args, torch.nn.Linear(1, 1))
        assert args.lr_scheduler_type == content["scheduler"]


TINY = {
    "one_run": {"train": ["--steps", "8", "--eval-every", "2"]},
    "learn_select_train": {
        "learn": ["--stage1-steps", "3", "--stage2-steps", "5"],
        "train": ["--eval-every", "2"],
    },
}


@pytest.mark.parametrize("name", TINY)
def test_a_file_for_config_runs_on_a_tiny_model(name, clone, tiny_model_folder, data):
    shutil.rmtree(clone / "runs")
    for command in commands_of(REPOSITORY / "examples" / f"{name}.yaml"):
        more = TINY[name].get(command[1], [])
        if more:
            more = [*more, "--model", str(tiny_model_folder), "--data", str(data)]
            more += ["--report-to", "none"]
        result = CliRunner().invoke(app, [*command[1:], *more])
        assert result.exit_code == 0, (command, result.output, result.exception)
    (metrics,) = (clone / "runs").rglob("metrics.json")
    found = json.loads(metrics.read_text())
    assert found["open_modules"] == 4 and len(found["evaluations"]) >= 2
    assert found["held_out_loss"] < found["held_out_loss_before"]


FSDP_JOB = """
import sys
from ila.cli import main

sys.argv = ["ila", *sys.argv[1:]]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "adapters"),
    [([], 14), (["--select-at", "0.5", "--top", "0.3", "--closed", "drop"], 4)],
    ids=["all layers", "one run"],
)
def test_the_file_for_fsdp2_trains_on_two_processes(
    run_ranks, clone, tiny_model_folder, data, selection, adapters
):
    (command,) = commands_of(REPOSITORY / "examples" / "fsdp2.yaml")
    more = ["--model", tiny_model_folder, "--data", data, "--epochs", "2", "--eval-every", "1"]
    more += ["--dtype", "float32", "--rank", "2", "--gradient-accumulation", "1"]
    run_ranks(FSDP_ON_CPUS + FSDP_JOB, *command[1:], *more, *selection)
    found = json.loads((clone / "runs/fsdp/metrics.json").read_text())
    assert found["evaluations"][-1][1] == found["held_out_loss"] < found["held_out_loss_before"]
    assert_plain_adapter(clone / "runs/fsdp", tiny_model_folder, adapters)


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def pages_with(language: str) -> list[str]:
    found = [page for page in PAGES if snippets(page, language)]
    assert "README.md" in found
    return found


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs(page, tiny_model_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    dataset, _ = encode(rows, AutoTokenizer.from_pretrained(tiny_model_folder))
    quick = ila.SearchConfig(stage1_steps=3, stage2_steps=5, batch_size=2)
    short = functools.partial(ila.learn_mask, config=quick, progress=False)
    monkeypatch.setattr(ila, "learn_mask", short)
    base_model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    for code in snippets(page, "python"):
        exec(compile(code, page, "exec"), {"base_model": base_model, "dataset": dataset})
        if "save_pretrained" in code:
            assert_plain_adapter(tmp_path / "adapter", tiny_model_folder, 4, trained=False)


def ila_lines(page: str) -> list[list[str]]:
    lines = "".join(snippets(page, "sh")).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == "ila"]


@pytest.mark.parametrize("page", [page for page in pages_with("sh") if ila_lines(page)])
def test_commands_and_options_of_a_page_exist(page):
    commands = get_command(app).commands
    for _, verb, *words in ila_lines(page):
        known = {flag for parameter in commands[verb].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, (verb, words)


def test_the_guide_shows_every_command():
    verbs = {line[1] for line in ila_lines("docs/guide.md")}
    assert verbs == set(get_command(app).commands) - {"demo"}


def test_the_commands_of_the_readme_run_one_after_the_other(
    tiny_model_folder, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    short = {
        "learn": ["--stage1-steps", "2", "--stage2-steps", "5", "--batch-size", "2"],
        "train": ["--steps", "4", "--batch-size", "2"],
    }
    for words in ila_lines("README.md"):
        named = {"MODEL": str(tiny_model_folder), "rows.jsonl": str(data)}
        if "--blocks" in words:
            named[words[words.index("--blocks") + 1]] = "1"  # the model has few
        command = [named.get(word, word) for word in words[1:]]
        result = CliRunner().invoke(app, [*command, *short.get(command[0], [])])
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert_plain_adapter(tmp_path / "runs" / "top30", tiny_model_folder, 4)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (REPOSITORY / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_the_front_door_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 130


def test_pages_are_rendered_from_the_results():
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

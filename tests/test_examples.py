"""The examples and the README's snippets do what they say, on a model of two blocks."""

import functools
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command
from typer.testing import CliRunner

import ila
from ila.cli import app
from ila.data.encoding import encode

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

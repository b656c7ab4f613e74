"""Whether a model's configuration fits its weights, found before anything of that size is made.

A number that is wrong by a bit asks for a billion blocks or for more memory than there is, and
libraries begin to make them. Both are cheap to see: counts of modules in the configuration itself,
and all sizes by building the model without storage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ila.boundary import reading

# No model has as many blocks, layers or experts; making them one by one would take minutes.
MOST_MODULES = 20_000
# Weights of a bit each are packed tightest; a model of more parameters is not in its file.
_PARAMETERS_PER_BYTE = 16
_COUNTS = re.compile(r"(^|_)(layers?|blocks?|experts?|depths?)(_|$)|^depth$")
_NO_COUNTS = re.compile(r"(^|_)(size|sizes|dim|len|length|interval|freq|step|id|ids|types?)(_|$)")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def check_counts(folder: Path, gguf_file: str | None) -> None:
    """Refuse a configuration that asks for more modules than any model has.

    Args:
        folder: A local folder; one that is none passes, for the hub's models are read elsewhere.
        gguf_file: Its GGUF file, if that is the model.

    Raises:
        ValueError: Names the file, the number and the most that is taken.
    """
    if not folder.is_dir():
        return
    file = folder / (gguf_file or "config.json")
    for name, value in _numbers(file) if gguf_file is None else _gguf_numbers(file):
        if _is_count(name) and abs(value) > MOST_MODULES:
            raise ValueError(
                f"{file}: {name} must be at most {MOST_MODULES:,}, got {value:.6g}; is it damaged?"
            )


def check_fits(
    config: PretrainedConfig, folder: Path, gguf_file: str | None, trust_remote_code: bool
) -> None:
    """Refuse a configuration of far more parameters than the files of weights can hold.

    Raises:
        ValueError: Names the folder, the parameters and the bytes.
    """
    if not folder.is_dir():
        return
    names = _WEIGHTS if gguf_file is None else (gguf_file,)
    found = sum(file.stat().st_size for name in names for file in folder.glob(name))
    with reading(folder, "model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    count = sum(parameter.numel() for parameter in model.parameters())
    if found and count > _PARAMETERS_PER_BYTE * found:
        raise ValueError(
            f"model {folder} must have no more parameters than its weights hold: the configuration "
            f"asks for {count:,}, and the weights are {found:,} bytes"
        )


def load_config(
    name: str, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Read a model's configuration, checked for numbers that no model has.

    Raises:
        FileNotFoundError: The model has none, or it cannot be found.
        ValueError: It cannot be read.
    """
    check_counts(Path(name), gguf_file)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with reading(name, "model"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def _is_count(name: str) -> bool:
    return bool(_COUNTS.search(name)) and not _NO_COUNTS.search(name)


def _numbers(file: Path) -> Iterator[tuple[str, float]]:
    """Every number of a JSON file with the key that it stands under."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the whole of it says what is wrong
    yield from _numbers_in(document, "")


def _numbers_in(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers_in(inner, str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _gguf_numbers(file: Path) -> Iterator[tuple[str, float]]:
    from gguf import GGUFReader

    with reading(file, "model"):
        fields = list(GGUFReader(file).fields.values())
        for field in fields:
            value = field.contents() if len(field.types) == 1 else None
            if isinstance(value, int | float):
                yield field.name.rpartition(".")[2], value

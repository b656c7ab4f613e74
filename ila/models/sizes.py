"""Check that a model's configuration fits its weights, before any library allocates memory.

A number that is wrong by a bit may ask for a billion blocks, or for more memory than the machine
has, and libraries begin to make them. Both checks are cheap: the configuration itself holds counts
of modules, and a model without storage has all sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ila.boundary import reading

# No model has so many blocks, layers or experts; making them would take minutes.
MOST_MODULES = 20_000
# Packing is never tighter: a file cannot hold a model of more parameters.
_PARAMETERS_PER_BYTE = 16
_COUNTS = re.compile(r"(^|_)(layers?|blocks?|experts?|depths?)(_|$)|^depth$")
_NO_COUNTS = re.compile(r"(^|_)(size|sizes|dim|len|length|interval|freq|step|id|ids|types?)(_|$)")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def check_counts(folder: Path, gguf_file: str | None) -> None:
    """Refuse a configuration that asks for more modules than any model has.

    Args:
        folder: Local folder. Any other name passes: it is a model of the hub.
        gguf_file: GGUF file of the folder, if that is the model.

    Raises:
        ValueError: Names the file, the number and the limit.
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
    size = sum(file.stat().st_size for name in names for file in folder.glob(name))
    with reading(folder, "model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    count = sum(parameter.numel() for parameter in model.parameters())
    if size and count > _PARAMETERS_PER_BYTE * size:
        raise ValueError(
            f"model {folder} must have no more parameters than its weights hold: the configuration "
            f"asks for {count:,}, and the weights are {size:,} bytes"
        )


def load_config(
    name: str, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Read a model's configuration and refuse numbers that no model has.

    Raises:
        FileNotFoundError: The model or its configuration is missing.
        ValueError: The configuration cannot be read.
    """
    check_counts(Path(name), gguf_file)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with reading(name, "model"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def _is_count(name: str) -> bool:
    return bool(_COUNTS.search(name)) and not _NO_COUNTS.search(name)


def _numbers(file: Path) -> Iterator[tuple[str, float]]:
    """Yield every number of a JSON file with its key."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # a later reader of the whole file raises with the reason
    yield from _numbers_in(document, "")


def _numbers_in(value: object, name: str) -> Iterator[tuple[str, float]]:
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

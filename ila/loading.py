"""Models and tokenizers from a hub id, a local folder, or a folder with a GGUF file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DTYPES = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Source:
    """Where a model comes from: hub id or folder, and the GGUF file in it if that is the model."""

    name: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` for model and tokenizer."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        return options


def find_source(
    model: str, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Tell a hub id, a folder, and a folder with a GGUF file apart.

    Args:
        model: Hub id, local folder, or path of a ``.gguf`` file.
        gguf_file: Name of the GGUF file in the folder or hub repository, if that is the model.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        FileNotFoundError: If a local path holds no model or no such GGUF file.
        ValueError: If a folder holds several GGUF files and none is named.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.name, trust_remote_code)
    if path.is_dir():
        if gguf_file is None and not (path / "config.json").exists():
            found = sorted(p.name for p in path.glob("*.gguf"))
            if not found:
                raise FileNotFoundError(f"model folder {model!r} has no config.json or .gguf file")
            if len(found) > 1:
                raise ValueError(f"gguf_file must name one of {found} in {model!r}")
            gguf_file = found[0]
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise FileNotFoundError(f"gguf_file {gguf_file!r} is not in folder {model!r}")
        return Source(str(path), gguf_file, trust_remote_code)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"model {model!r} is a path, but nothing is there")
    return Source(model, gguf_file, trust_remote_code)


def load_model(source: Source, dtype: str = "auto") -> PreTrainedModel:
    """Load a causal language model, in evaluation mode, on the CPU.

    Args:
        source: From ``find_source``.
        dtype: ``"auto"`` (that of the checkpoint; bfloat16 for GGUF), ``"bfloat16"``,
            ``"float16"`` or ``"float32"``.

    Raises:
        ValueError: If ``dtype`` is not one of these, or the weights are damaged.
        FileNotFoundError: If the model can be found neither here nor on the hub.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    wanted = DTYPES[dtype]
    if wanted == "auto" and source.gguf_file is not None:
        wanted = torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(source.name, dtype=wanted, **source.options())
    except OSError as error:
        raise FileNotFoundError(_not_found(source, error)) from error
    except SafetensorError as error:
        raise ValueError(f"the weights of model {source.name!r} are damaged: {error}") from error
    if source.gguf_file is not None:
        # The weights are plain tensors now; without this, saving would try to write them as GGUF.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
    return model


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        FileNotFoundError: If it can be found neither here nor on the hub.
        ValueError: If it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options())
    except OSError as error:
        raise FileNotFoundError(_not_found(source, error)) from error
    except ValueError as error:
        raise ValueError(
            f"the tokenizer of model {source.name!r} cannot be read: {error}"
        ) from error
    if source.gguf_file is not None:
        _repair_pre_tokenizer(tokenizer, Path(source.name) / source.gguf_file)
    return tokenizer


def identity(model: PreTrainedModel, source: Source) -> dict[str, Any]:
    """What says which model this is: source, architecture, size, dtype, hash of its shape."""
    config = AutoConfig.for_model(**model.config.to_dict()).to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(key, None)
    canonical = json.dumps(config, sort_keys=True, default=str)
    return {
        "source": source.name,
        "gguf_file": source.gguf_file,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config_fingerprint": "sha256:" + hashlib.sha256(canonical.encode()).hexdigest(),
    }


def _not_found(source: Source, error: OSError) -> str:
    first = str(error).strip().splitlines()[0]
    return (
        f"model {source.name!r} is not a local folder with a model, and loading it from the hub "
        f"failed: {first}"
    )


# Pre-tokenizers that transformers does not rebuild from a GGUF file, by their name in the file.
# SmolLM2 splits digits one by one before its byte-level BPE.
_PRE_TOKENIZERS = {
    "smollm": lambda: Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
}


def _repair_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    if not path.is_file():
        return
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    name = None if field is None else field.contents()
    if name in _PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()

"""Models and tokenizers from a hub id, a local folder, or a folder with a GGUF file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from ila.boundary import InputError, reading
from ila.data.contracts import Row
from ila.models.sizes import check_counts, check_fits, load_config

DTYPES = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


LOAD_IN = ("4bit", "8bit")


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
        ValueError: If a folder holds an adapter, or several GGUF files and none is named.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.name, trust_remote_code)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"model folder {model!r} must hold a base model, but it holds an adapter "
                "(adapter_config.json); give the model that the adapter was trained on, or merge "
                "the two first"
            )
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


def load_model(
    source: Source,
    dtype: str = "auto",
    load_in: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    Args:
        source: From ``find_source``.
        dtype: ``"auto"`` (that of the checkpoint; bfloat16 for GGUF), ``"bfloat16"``,
            ``"float16"`` or ``"float32"``.
        load_in: ``"4bit"`` (NF4 with double quantisation, products in the model's dtype) or
            ``"8bit"`` (LLM.int8()) has bitsandbytes pack every linear layer but the output's.
        device: Where it goes.

    Raises:
        ValueError: If ``dtype`` or ``load_in`` is not one of these, the model is a GGUF file and
            should be packed, or the weights are damaged.
        RuntimeError: If ``load_in`` is given and bitsandbytes is not installed.
        FileNotFoundError: If the model can be found neither here nor on the hub.
        ImportError: If it is a GGUF file and the package to read it is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    _need_gguf(source)
    wanted = DTYPES[dtype]
    if wanted == "auto" and source.gguf_file is not None:
        wanted = torch.bfloat16
    options = source.options()
    if load_in is not None:
        options |= _packing(source, load_in, wanted)
        options["device_map"] = {"": device}
    try:
        with reading(source.name, "model"):
            config = load_config(source.name, source.gguf_file, source.trust_remote_code)
            folder = Path(source.name)
            check_fits(config, folder, source.gguf_file, source.trust_remote_code)
            model, report = AutoModelForCausalLM.from_pretrained(
                source.name, dtype=wanted, output_loading_info=True, **options
            )
    except InputError as error:
        raise _of_model(source, error) from error.__cause__
    _check_whole(source, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model {source.name!r} must be a base model, but an adapter comes with it; give the "
            "model that the adapter was trained on"
        )
    if source.gguf_file is not None:
        # The weights are plain tensors now; without this, saving would try to write them as GGUF.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
    # A packed model is where it was loaded, and some refuse to be asked.
    return model if getattr(model, "is_quantized", False) else model.to(device)


def _packing(source: Source, load_in: str, dtype: torch.dtype | str) -> dict[str, Any]:
    if load_in not in LOAD_IN:
        raise ValueError(f"load_in must be one of {LOAD_IN}, got {load_in!r}")
    if source.gguf_file is not None:
        raise ValueError(f"load_in={load_in!r} needs a model that is no GGUF file")
    if find_spec("bitsandbytes") is None:
        raise RuntimeError(
            f"load_in={load_in!r} needs bitsandbytes: pip install 'ila-kernels[quant]'"
        )
    if load_in == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if dtype == "auto":
        config = load_config(source.name, None, source.trust_remote_code)
        dtype = config.dtype or torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def check_runs(model: PreTrainedModel, source: Source, rows: Iterable[Row] = ()) -> None:
    """Run a loaded model on its longest row, or on two tokens: an error is the model's own.

    Args:
        model: Unchanged model.
        source: Source of the model.
        rows: Rows with ``input_ids`` for the model.

    Raises:
        ValueError: The model cannot run, its loss is not finite, or its embedding has no row for a
            token.
    """
    longest: Sequence[int] = [0, 0]
    most = 0
    for row in rows:
        most = max(most, *row["input_ids"])
        longest = max(longest, row["input_ids"], key=len)
    known = model.get_input_embeddings().num_embeddings
    if most >= known:
        raise ValueError(
            f"the tokenizer of model {source.name!r} must give ids below {known}, for which the "
            f"model has embeddings, got {most}"
        )
    device = next(model.parameters()).device
    tokens = torch.tensor([list(longest)], device=device)
    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    try:
        with reading(source.name, "model"), torch.no_grad(), torch.random.fork_rng(devices):
            loss = float(model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss)
    finally:
        model.train(was_training)
    if len(longest) > 1 and not math.isfinite(loss):
        raise ValueError(
            f"model {source.name!r} must have a finite loss, got {loss} for a row of "
            f"{len(longest)} tokens; are its weights or its configuration damaged?"
        )


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        FileNotFoundError: If it can be found neither here nor on the hub.
        ValueError: If it cannot be read.
        ImportError: If it is in a GGUF file and the package to read that is not installed.
    """
    _need_gguf(source)
    check_counts(Path(source.name), source.gguf_file)
    try:
        with reading(source.name, "tokenizer of model"):
            tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options())
            # On the hub as in a folder: the file is in the cache by now.
            gguf = source.gguf_file and cached_file(source.name, source.gguf_file)
            tokenizer("a")
    except InputError as error:
        raise _of_model(source, error) from error.__cause__
    if gguf:
        with reading(gguf, "tokenizer of model"):
            _repair_pre_tokenizer(tokenizer, gguf)
    return tokenizer


def _check_whole(source: Source, report: Mapping[str, object]) -> None:
    """Refuse a model of which weights were not there: they would be drawn at random."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the weights of model {source.name!r} must be all there: {len(missing)} lack, such as "
            f"{missing[0]}"
        )


def _of_model(source: Source, error: InputError) -> Exception:
    """Turn the error of a library into an error about the model: not found, or damaged."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is None:
        return FileNotFoundError(_not_found(source, cause))
    if isinstance(cause, SafetensorError):
        return ValueError(f"the weights of model {source.name!r} are damaged: {cause}")
    return error


# Entries of a configuration about a file, a run or a tokenizer, not about layers: a chat model
# often has end-of-turn ids of its own, and a model loaded in 4 bits is still the same one.
_NOT_OF_THE_LAYERS = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)


def identity(model: PreTrainedModel, source: Source) -> dict[str, Any]:
    """Identify a model: source, architecture, size, dtype, hashes of its shape.

    ``layers_fingerprint`` hashes names and sizes of the layers that can take an adapter.
    ``config_fingerprint`` hashes the configuration; masks of older versions have only this one.
    """
    with reading(source.name, "model"):
        config = AutoConfig.for_model(**model.config.to_dict()).to_diff_dict()
    for key in _NOT_OF_THE_LAYERS:
        config.pop(key, None)
    return {
        "source": source.name,
        "gguf_file": source.gguf_file,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),  # of a packed weight too
        "dtype": str(model.dtype).removeprefix("torch."),
        "config_fingerprint": _hash(config),
        "layers_fingerprint": _hash(_layer_sizes(model)),
    }


def same_layers(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Tell whether two ``identity`` are of models whose layers have the same names and sizes.

    A mask of an older version passes if it has the same configuration, or the same architecture
    and number of parameters: most of a configuration says nothing of the layers.
    """
    for key in ("layers_fingerprint", "config_fingerprint"):
        if one.get(key) and other.get(key):
            if one[key] == other[key] or key == "layers_fingerprint":
                return one[key] == other[key]
            sizes = ("architecture", "parameters")
            return all(one.get(name) == other.get(name) is not None for name in sizes)
    return True


def _layer_sizes(model: PreTrainedModel) -> dict[str, list[int]]:
    head = model.get_output_embeddings()  # grows with the vocabulary
    modules = {name: module for name, module in model.named_modules() if module is not head}
    linears = {n: m for n, m in modules.items() if hasattr(m, "in_features")}
    sizes = {name: [linear.in_features, linear.out_features] for name, linear in linears.items()}
    sizes |= {n: [m.nx, m.nf] for n, m in modules.items() if isinstance(m, Conv1D)}
    experts = {name: list(p.shape) for name, p in model.named_parameters() if p.dim() == 3}
    return sizes | experts


def _hash(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _need_gguf(source: Source) -> None:
    if source.gguf_file is not None and find_spec("gguf") is None:
        raise ImportError(
            f"reading {source.gguf_file} needs the package gguf: pip install 'ila-kernels[gguf]'"
        )


def _not_found(source: Source, error: OSError) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(source.name).is_dir():
        return f"model folder {source.name!r} lacks a file, or one of them is damaged: {first}"
    return (
        f"model {source.name!r} is not a local folder, and loading it from the hub failed: {first}"
    )


# Pre-tokenizers that transformers does not rebuild from a GGUF file, by their name in the file.
# SmolLM2 splits digits one by one before its byte-level BPE.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
}


def _repair_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    name = None if field is None else field.contents()
    if name in _PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()

"""Write a mask as other tools take it: the full names of the open layers as targets of LoRA.

    peft           JSON: {"target_modules": [...]}, an argument of ``peft.LoraConfig``
    axolotl        YAML: ``lora_target_modules``, which axolotl hands to PEFT, and
                   ``lora_target_linear: false``, which would add every linear layer
    llamafactory   YAML: ``lora_target``, names with commas

Layers that are tensors of experts stand in ``target_parameters`` and ``lora_target_parameters``;
LLaMA-Factory has no such option.

PEFT takes a name of such a list for the module of this name, or of one that ends in it after a dot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ila.masks.mask import LayerMask
from ila.masks.provenance import Provenance
from ila.masks.rules import bare
from ila.runs.atomic import write_text_atomic


def _peft(names: list[str], tensors: list[str]) -> str:
    beside = {"target_parameters": tensors} if tensors else {}
    return json.dumps({"target_modules": names, **beside}, indent=2) + "\n"


def _axolotl(names: list[str], tensors: list[str]) -> str:
    beside = _listed("lora_target_parameters", tensors) if tensors else ""
    return "lora_target_linear: false\n" + _listed("lora_target_modules", names) + beside


def _listed(key: str, names: list[str]) -> str:
    lines = "".join(f"\n  - {name}" for name in names)
    return f"{key}:{lines}\n" if names else f"{key}: []\n"


def _llamafactory(names: list[str], tensors: list[str]) -> str:
    if tensors:
        raise ValueError(
            f"format 'llamafactory' has no option for tensors of experts, and {tensors[0]} is "
            "open; use 'peft' or 'axolotl', or close them"
        )
    return f"lora_target: {','.join(names)}\n"


# Name -> ending of the file, and its text.
_WRITERS: dict[str, tuple[str, Callable[[list[str], list[str]], str]]] = {
    "peft": (".peft.json", _peft),
    "axolotl": (".axolotl.yaml", _axolotl),
    "llamafactory": (".llamafactory.yaml", _llamafactory),
}
FORMATS = tuple(_WRITERS)


def check_format(name: str | None) -> None:
    """Raise unless a format is None or one of ``FORMATS``."""
    if name is not None and name not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {name!r}")


def text_of(mask: LayerMask, name: str) -> str:
    r"""Return the open layers of a mask in a format.

    >>> mask = LayerMask({"base_model.model.h.0.q": 1.0, "base_model.model.h.1.q": 2.0}).top(0.5)
    >>> text_of(mask, "llamafactory")
    'lora_target: h.1.q\n'
    """
    check_format(name)
    tensors = Provenance(mask.provenance).target_parameters
    modules = [bare(layer) for layer in mask.open if layer not in tensors]
    return _WRITERS[name][1](modules, [str(tensors[n]) for n in mask.open if n in tensors])


def write_format(mask: LayerMask, mask_file: Path, name: str) -> Path:
    """Write the open layers beside the file of their mask; return the file."""
    stem = mask_file.name.removesuffix(".json")
    out = mask_file.with_name(stem + _WRITERS[name][0])
    write_text_atomic(out, text_of(mask, name))
    return out

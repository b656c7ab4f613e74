"""Learn which linear layers matter for an alignment data set, and train only those.

Built on PEFT: adapters are PEFT adapters, models are Hugging Face models. Importing this module
does not load ``transformers``' Trainer or touch a GPU; names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ila.masks.mask import LayerMask as LayerMask
    from ila.models.checkpointing import gradient_checkpointing as gradient_checkpointing
    from ila.models.edit import ConversionReport as ConversionReport
    from ila.models.edit import MaskReport as MaskReport
    from ila.models.edit import apply_mask as apply_mask
    from ila.models.edit import attach as attach
    from ila.models.edit import convert as convert
    from ila.models.edit import restore as restore
    from ila.models.explain import Explanation as Explanation
    from ila.models.explain import explain as explain
    from ila.models.layer import MaskedLoraLinear as MaskedLoraLinear
    from ila.models.lean_head import lean_head as lean_head
    from ila.plugins.take_over import TakeOver as TakeOver
    from ila.search.in_place import select_layers as select_layers
    from ila.search.learn import SearchConfig as SearchConfig
    from ila.search.learn import learn_mask as learn_mask
    from ila.search.select_layers import SelectLayers as SelectLayers
    from ila_kernels._version import __version__ as __version__

_HOME = {
    "ConversionReport": "models.edit",
    "Explanation": "models.explain",
    "LayerMask": "masks.mask",
    "MaskReport": "models.edit",
    "MaskedLoraLinear": "models.layer",
    "SearchConfig": "search.learn",
    "SelectLayers": "search.select_layers",
    "TakeOver": "plugins.take_over",
    "apply_mask": "models.edit",
    "attach": "models.edit",
    "convert": "models.edit",
    "explain": "models.explain",
    "gradient_checkpointing": "models.checkpointing",
    "lean_head": "models.lean_head",
    "learn_mask": "search.learn",
    "restore": "models.edit",
    "select_layers": "search.in_place",
}
__all__ = [
    "ConversionReport",
    "Explanation",
    "LayerMask",
    "MaskReport",
    "MaskedLoraLinear",
    "SearchConfig",
    "SelectLayers",
    "TakeOver",
    "__version__",
    "apply_mask",
    "attach",
    "convert",
    "explain",
    "gradient_checkpointing",
    "lean_head",
    "learn_mask",
    "restore",
    "select_layers",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from ila_kernels._version import __version__ as value
    elif name in _HOME:
        value = getattr(import_module(f"ila.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'ila' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

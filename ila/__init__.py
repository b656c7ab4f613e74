"""Learn which linear layers matter for an alignment data set, and train only those.

Built on PEFT: adapters are PEFT adapters, models are Hugging Face models. Importing this module
does not load ``transformers``' Trainer or touch a GPU; names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ila.checkpointing import gradient_checkpointing as gradient_checkpointing
    from ila.explanation import Explanation as Explanation
    from ila.explanation import explain as explain
    from ila.layer import MaskedLoraLinear as MaskedLoraLinear
    from ila.mask import LayerMask as LayerMask
    from ila.model import ConversionReport as ConversionReport
    from ila.model import MaskReport as MaskReport
    from ila.model import apply_mask as apply_mask
    from ila.model import attach as attach
    from ila.model import convert as convert
    from ila.model import restore as restore
    from ila.search import SearchConfig as SearchConfig
    from ila.search import learn_mask as learn_mask
    from ila_kernels._version import __version__ as __version__

_HOME = {
    "ConversionReport": "model",
    "Explanation": "explanation",
    "LayerMask": "mask",
    "MaskReport": "model",
    "MaskedLoraLinear": "layer",
    "SearchConfig": "search",
    "apply_mask": "model",
    "attach": "model",
    "convert": "model",
    "explain": "explanation",
    "gradient_checkpointing": "checkpointing",
    "learn_mask": "search",
    "restore": "model",
}
__all__ = [
    "ConversionReport",
    "Explanation",
    "LayerMask",
    "MaskReport",
    "MaskedLoraLinear",
    "SearchConfig",
    "__version__",
    "apply_mask",
    "attach",
    "convert",
    "explain",
    "gradient_checkpointing",
    "learn_mask",
    "restore",
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

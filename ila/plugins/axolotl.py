"""The plugin for axolotl: ``plugins: [ila.plugins.axolotl.IlaPlugin]`` and keys ``ila_…``.

axolotl makes model, adapter and trainer. The plugin converts the layers of the adapter to ours
after the model is loaded, applies the mask of ``ila_mask``, and adds the callback of a selection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import create_model

from ila.plugins.options import PREFIX, PluginOptions

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from transformers import PreTrainedModel, TrainerCallback

# axolotl switches these on by default. They read A and B of a layer past its forward.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

# The keys of the configuration, for axolotl's check of its types.
IlaArgs = create_model(
    "IlaArgs",
    **{f"{PREFIX}{name}": (kind, None) for name, kind in get_type_hints(PluginOptions).items()},
)


class IlaPlugin(BasePlugin):
    """Train with our layers, under a mask or with a selection, inside axolotl."""

    def get_input_args(self) -> str:
        """Return the place of the keys' model."""
        return f"{__name__}.{IlaArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check our keys, and let axolotl's own LoRA kernels rest.

        Raises:
            ValueError: If a key is unknown or does not fit, or a kernel is asked for.
        """
        PluginOptions.read(cfg).take_over()  # reads the mask before a large model loads
        asked = [name for name in KERNELS if cfg.get(name)]
        if asked:
            raise ValueError(
                f"{asked[0]} and {type(self).__name__} compute the same layers; leave one out"
            )
        for name in KERNELS:
            cfg[name] = False

    def post_model_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Convert the layers and apply the mask, before a trainer is built."""
        PluginOptions.read(cfg).take_over().prepare(model)

    def add_callbacks_pre_trainer(
        self, cfg: DictDefault, model: PreTrainedModel
    ) -> list[TrainerCallback]:
        """Return the callback of a selection."""
        return PluginOptions.read(cfg).callbacks()

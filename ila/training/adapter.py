"""Count, gather, write and read the adapter that a training keeps."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import AdaLoraConfig, PeftConfig, PeftModel
from peft.utils import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import Trainer

from ila.boundary import reading
from ila.models.adalora import tuner_of, whole_ranks, with_closed_ranks
from ila.models.base_starts import give_back_base, take_base
from ila.models.edit import masked_layers, single_adapter
from ila.models.layer import MaskedLoraLayer
from ila.models.merge import check_same_tensors
from ila.models.targets import outside
from ila.runs.metrics import LayerCounts
from ila.runs.processes import whole
from ila.training.card import write_card
from ila.training.rank_schedule import ranked


def whole_state(peft_model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the model's state dict, one adapter's tensors gathered; all processes call this."""
    state = peft_model.state_dict()
    # The tensors that PEFT saves; its rules change names but not the tensors.
    saved = get_peft_model_state_dict(peft_model, state_dict=dict(state), adapter_name=adapter)
    wanted = {id(tensor) for tensor in saved.values()}
    return {name: whole(t) if id(t) in wanted else t for name, t in state.items()}


def save_adapter(
    peft_model: PeftModel, adapter: str, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write one adapter into ``folder`` itself; PEFT gives all but "default" a subfolder.

    The files belong to the pretrained base, even if the adapter began with a part of it.

    Args:
        peft_model: Model with the adapter.
        adapter: Name of the adapter.
        folder: An empty folder.
        state: Result of ``whole_state``; a sharded model needs it.
    """
    with warnings.catch_warnings():
        if isinstance(peft_model.peft_config[adapter], AdaLoraConfig):
            # PEFT takes a layer that has lost every rank for a shard that was not gathered.
            warnings.filterwarnings("ignore", message=".*have invalid shape")
        peft_model.save_pretrained(folder, selected_adapters=[adapter], state_dict=state)
    if adapter != "default":
        for path in (folder / adapter).iterdir():
            path.replace(folder / path.name)
        (folder / adapter).rmdir()
    give_back_base(peft_model, folder)
    write_card(folder, peft_model, adapter)


def load_adapter(peft_model: PeftModel, adapter: str, folder: Path) -> None:
    """Read a folder that ``save_adapter`` wrote into a model that has this adapter.

    Raises:
        ValueError: If the weights are damaged.
    """
    with reading(f"{folder} is damaged", "the adapter in"):
        weights = load_peft_weights(str(folder), device="cpu")
        config = peft_model.peft_config[adapter]
        if not isinstance(config, AdaLoraConfig):
            _load(peft_model, adapter, take_base(peft_model, weights), folder)
            return
        pattern = PeftConfig.from_pretrained(str(folder)).rank_pattern
        with whole_ranks(config):
            own = get_peft_model_state_dict(peft_model, adapter_name=adapter)
            whole = with_closed_ranks(weights, own, pattern)
            _load(peft_model, adapter, whole, folder)
        config.rank_pattern = pattern


def _load(peft_model: PeftModel, adapter: str, weights: dict[str, Tensor], folder: Path) -> None:
    own = get_peft_model_state_dict(peft_model, adapter_name=adapter)
    check_same_tensors(weights, own, folder)
    set_peft_model_state_dict(peft_model, weights, adapter_name=adapter)


class Adapter:
    """The one active adapter of a model; it is ``Trained``."""

    def __init__(self, model: PeftModel):
        self.model, self.adapter = model, single_adapter(model, None)

    def counts(self) -> LayerCounts:
        """Return how many layers are open and how many parameters are trained.

        Raises:
            ValueError: If no parameter requires grad.
        """
        return _counts(self.model, self.adapter)

    def trainer_class(self, kind: type[Trainer] = Trainer) -> type[Trainer]:
        """Return ``kind``: its checkpoints hold the adapter alone, by PEFT's own rules.

        For an AdaLoRA adapter, return the form of ``kind`` that moves its ranks.
        """
        return kind if tuner_of(self.model) is None else ranked(kind)

    def state(self) -> dict[str, Tensor]:
        """Return the whole adapter; all processes call this."""
        return whole_state(self.model, self.adapter)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the result of ``state``."""
        save_adapter(self.model, self.adapter, folder, state)

    def load(self, folder: Path) -> None:
        """Read a folder that ``save`` wrote."""
        load_adapter(self.model, self.adapter, folder)


def _counts(peft_model: PeftModel, adapter: str) -> LayerCounts:
    layers = masked_layers(peft_model, adapter)
    if not layers:  # PEFT's own layers: count the holders of the adapter
        layers = {
            n: m for n, m in peft_model.named_modules() if adapter in getattr(m, "lora_A", ())
        }
    ours = [layer for layer in layers.values() if isinstance(layer, MaskedLoraLayer)]
    is_open = [layer not in ours or layer.is_open(adapter) for layer in layers.values()]
    kept = sum(layer.is_kept(adapter) for layer in ours)
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    beside = outside(peft_model, layers).parameters
    if trainable == 0:
        raise ValueError("peft_model must have parameters that require grad; none does")
    counts: LayerCounts = {
        "open_modules": sum(is_open),
        "total_modules": len(layers),
        "fraction_open": sum(is_open) / max(1, len(layers)),
        "trainable_parameters": trainable,
        **({"outside_parameters": beside} if beside else {}),
    }
    return counts | {"kept_modules": kept} if kept else counts

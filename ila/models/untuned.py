"""Read the verdicts of ``ila tune`` for a model on a GPU; say once if there is no verdict."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import distributed, nn

from ila.models.layer import MaskedLoraLayer
from ila_kernels import use_verdicts, verdicts_in_use

_LOG = logging.getLogger(__name__)
_said: set[str] = set()


def read_verdicts_of(model: nn.Module, layers: Sequence[MaskedLoraLayer]) -> None:
    """Let ``impl="auto"`` choose by the verdicts of ``ila tune``, or say that it kept nothing.

    Several processes of one training do that together, when the training begins
    (``ila.training.verdicts``).
    """
    if not layers:
        return
    device = _device_of(layers)
    if device.type != "cuda" or _has_partners():
        return
    if not (verdicts_in_use().all or use_verdicts(device=device)):
        name = getattr(getattr(model, "config", None), "name_or_path", "") or "MODEL"
        say_untuned(device, len(layers), name)


def say_untuned(device: torch.device, layers: int | None = None, model: str = "MODEL") -> None:
    """Say once for each GPU that it was never measured, and the command that measures it."""
    gpu = torch.cuda.get_device_name(device)
    if gpu not in _said:
        _said.add(gpu)
        count = "the" if layers is None else str(layers)
        _LOG.warning(
            f"Library GEMMs compute {count} layers: no measurement on {gpu} yet; "
            f"`ila tune --model {model}` takes one and keeps it"
        )


def _device_of(layers: Sequence[MaskedLoraLayer]) -> torch.device:
    return layers[0].weight.device


def _has_partners() -> bool:
    started = distributed.is_available() and distributed.is_initialized()
    return started or distributed.is_torchelastic_launched()

"""The part of a model that a run trains: an adapter, or the layers' own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import Trainer

from ila.runs.metrics import LayerCounts


class Trained(Protocol):
    """Part of a model that a run trains, counts, keeps and reads back.

    ``training.adapter.Adapter`` and ``models.open_weights.OpenLayers`` are such parts, and so are
    the updates that a search scores (``search.stage.Updates``).

    Attributes:
        model: The model; its parameters that require grad are the part.
    """

    model: nn.Module

    def counts(self) -> LayerCounts:
        """Return how many layers are open and how many parameters are trained."""

    def trainer_class(self, kind: type[Trainer] = Trainer) -> type[Trainer]:
        """Return the form of ``kind`` whose checkpoints hold this part alone."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to keep, gathered; all processes call this."""

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the result of ``state`` into an empty folder; the main process calls this."""

    def load(self, folder: Path) -> None:
        """Read a folder that ``save`` wrote."""

"""Named readers of a mask's provenance: the one place that knows its keys.

``ila learn`` writes ``model``, ``data``, ``inputs``, ``versions`` and ``seed``, and puts the record
of the search under ``search``. ``ila.learn_mask`` alone writes that record at the top. A key that
is absent reads as None: masks are older than some keys, and users may write their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict, TypeVar

T = TypeVar("T", str, int)


class Course(TypedDict, total=False):
    """How stage 1 went.

    Attributes:
        steps: Optimiser steps; 0 for a method without stage 1, which has no other entry.
        stopped: ``"stable"`` or ``"budget"``.
        first_window_loss: Mean training loss of the first ``loss_window`` steps.
        last_window_loss: The same of the last ones.
        loss_window: Steps in each of the two means.
        evaluations: [step, held-out loss] of every evaluation; absent without any.
    """

    steps: int
    stopped: str
    first_window_loss: float
    last_window_loss: float
    loss_window: int
    evaluations: list[list[float]]


class HeldOutLoss(TypedDict):
    """Loss on the held-out rows around stage 1; None without such rows."""

    before: float | None
    after_stage1: float | None
    rows: int


@dataclass(frozen=True)
class Provenance:
    """Read the provenance of a mask by name.

    >>> said = Provenance({"inputs": {"rank": 8}, "search": {"config": {"method": "path"}}})
    >>> said.method, said.rank, said.model
    ('path', 8, None)
    """

    tree: Mapping[str, object]

    @property
    def method(self) -> str | None:
        """Method that scored the layers."""
        return self._search(str, "config", "method")

    @property
    def batch_size(self) -> int | None:
        """Rows of a step of the search."""
        return self._search(int, "config", "batch_size")

    @property
    def model(self) -> str | None:
        """Model that the search was told to load: a hub id, a folder or a file."""
        return self._read(str, "inputs", "model")

    @property
    def gguf_file(self) -> str | None:
        """Name of the GGUF file in the model's folder."""
        return self._read(str, "inputs", "gguf_file")

    @property
    def rank(self) -> int | None:
        """Rank of the adapter."""
        return self._read(int, "inputs", "rank")

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest row."""
        return self._read(int, "inputs", "max_length")

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter had dropout."""
        return bool(self._at("inputs", "dropout"))

    @property
    def answers(self) -> float | None:
        """Share of the tokens of the data that are labels."""
        tokens, labels = (self._read(int, "data", name) for name in ("tokens", "answer_tokens"))
        return labels / tokens if labels and tokens and labels <= tokens else None

    @property
    def load_in(self) -> str | None:
        """``"4bit"`` or ``"8bit"`` for a packed base."""
        return self._read(str, "inputs", "load_in")

    @property
    def model_source(self) -> str | None:
        """Place that the model came from."""
        return self._read(str, "model", "source")

    @property
    def model_fingerprint(self) -> str | None:
        """Digest of the model's configuration."""
        return self._read(str, "model", "config_fingerprint")

    @property
    def architecture(self) -> str | None:
        """Class of the model."""
        return self._read(str, "model", "architecture")

    @property
    def dtype(self) -> str | None:
        """Dtype of the model's weights, without ``torch.``."""
        return self._read(str, "model", "dtype")

    @property
    def target_parameters(self) -> Mapping[str, object]:
        """Layer -> the tensor that PEFT adapts there, of the layers that are tensors of experts."""
        return self._search_record("target_parameters")

    @property
    def full(self) -> bool:
        """Whether the layers' own weights were trained."""
        return bool(self._at("full"))

    @property
    def inputs(self) -> Mapping[str, object]:
        """Options of the command that learned the mask; empty if the mask has none."""
        return self._record("inputs")

    @property
    def model_record(self) -> Mapping[str, object]:
        """Identity of the model; empty if the mask has none."""
        return self._record("model")

    @property
    def config(self) -> Mapping[str, object]:
        """Configuration of the search; empty if the mask has none."""
        return self._search_record("config")

    def _search_record(self, key: str) -> Mapping[str, object]:
        return self._record("search", key) or self._record(key)

    def _record(self, *keys: str) -> Mapping[str, object]:
        record = self._at(*keys)
        return record if isinstance(record, Mapping) else {}

    def _search(self, kind: type[T], *keys: str) -> T | None:
        nested = self._read(kind, "search", *keys)
        return self._read(kind, *keys) if nested is None else nested

    def _read(self, kind: type[T], *keys: str) -> T | None:
        value = self._at(*keys)
        return value if isinstance(value, kind) else None

    def _at(self, *keys: str) -> object:
        value: object = self.tree
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

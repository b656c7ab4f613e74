"""The model and the batches that the model benchmarks share: a real model and real rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.harness.session import Options
from ila.commands.demo import unpack_model
from ila.data.contracts import IGNORED
from ila.data.encoding import Collator, encode
from ila.data.rows import load_rows
from ila.models.loading import find_source, load_model, load_tokenizer

_LOADED: dict[str, nn.Module] = {}
DEMO_MODEL = "SmolLM2-135M"


def model_folder(options: Options) -> str:
    """What ``--model`` names, else the demo's model, unpacked once into the scratch folder."""
    if options.model is not None:
        return options.model
    folder = options.scratch / DEMO_MODEL
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpack_model(folder, Console(stderr=True))
    return str(folder)


def base_model(options: Options) -> nn.Module:
    """The frozen base in bf16; loaded once, never changed."""
    folder = model_folder(options)
    if folder not in _LOADED:
        model = load_model(find_source(folder), "bfloat16", None, options.device)
        if options.attention is not None:
            model.set_attn_implementation(options.attention)
        _LOADED[folder] = model.requires_grad_(False)
    return _LOADED[folder]


@dataclass(frozen=True)
class Material:
    """Batches of rows × width from a file of instructions.

    Rows as they come, with labels at answers, padded to ``width``; or rows joined end to end and
    cut into pieces of ``width`` tokens, where every token is a label.
    """

    rows: list[dict[str, list[int]]]
    batch: int
    width: int
    device: torch.device

    @classmethod
    def read(
        cls, options: Options, batches: int, batch: int, width: int, joined: bool = False
    ) -> Material:
        """Rows of ``--data`` at equal distances over the whole file; cut at ``width`` tokens."""
        tokenizer = load_tokenizer(find_source(model_folder(options)))
        rows, _ = encode(load_rows(str(options.data)), tokenizer, max_length=width, progress=False)
        if joined:
            return cls(join(rows, batches * batch, width), batch, width, options.device)
        count = batches * batch
        if len(rows) < count:
            raise ValueError(f"data must have {count} rows, {options.data} has {len(rows)}")
        return cls(evenly(rows, count), batch, width, options.device)

    @property
    def labelled(self) -> float:
        """The share of the tokens, padding left out, whose next token is a label."""
        labels = [label for row in self.rows for label in row["labels"][1:]]
        return sum(label != IGNORED for label in labels) / sum(len(r["labels"]) for r in self.rows)

    @property
    def answers(self) -> float:
        """The share of the positions of a batch, padding included, whose next token is a label."""
        return self.labelled * self.tokens / (self.batch * self.width)

    @property
    def collator(self) -> Collator:
        return Collator(0, pad_to_multiple_of=self.width)

    @property
    def tokens(self) -> float:
        """Tokens of a batch on average, padding left out."""
        return sum(len(row["input_ids"]) for row in self.rows) * self.batch / len(self.rows)

    def members(self, turn: int) -> list[int]:
        """Numbers of the rows in the batch of a turn; the batches come again and again."""
        start = turn % (len(self.rows) // self.batch) * self.batch
        return list(range(start, start + self.batch))

    def __call__(self, turn: int) -> dict[str, Tensor]:
        batch = self.collator([self.rows[i] for i in self.members(turn)])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def evenly(rows: list[dict[str, list[int]]], count: int) -> list[dict[str, list[int]]]:
    """``count`` of the rows at equal distances, the first among them.

    >>> evenly(list("abcdefg"), 3)
    ['a', 'c', 'e']
    """
    return rows[:: len(rows) // count][:count]


def join(rows: list[dict[str, list[int]]], count: int, width: int) -> list[dict[str, list[int]]]:
    """``count`` pieces of ``width`` tokens out of rows end to end, again from the first if need be.

    >>> join([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}], 2, 3)[1]["labels"]
    [4, 1, 2]
    """
    stream = (token for row in cycle(rows) for token in row["input_ids"])
    pieces = [list(islice(stream, width)) for _ in range(count)]
    return [{"input_ids": p, "attention_mask": [1] * width, "labels": list(p)} for p in pieces]

"""Options that several commands take, each with its help.

Imports typer alone: ``ila --help`` loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Model: a hub id, a local folder, or a .gguf file.")]
Data = Annotated[
    str, typer.Option(help="Rows: a hub id, or a .json, .jsonl, .csv or .parquet file.")
]
Out = Annotated[Path, typer.Option(help="Folder that the results go into.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file in the model's folder.")]
Split = Annotated[str, typer.Option(help="Split to read of a hub data set.")]
Limit = Annotated[
    int | None, typer.Option(help="Number of rows to use, from the first; all without it.")
]
HeldOut = Annotated[
    float, typer.Option(help="Share of rows to keep apart and measure the loss on.")
]
MaxLength = Annotated[int, typer.Option(help="Tokens to cut a longer row at.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the base: auto, bfloat16, float16 or float32.")]
Rank = Annotated[int, typer.Option(help="Rank of the adapter.")]
Alpha = Annotated[float, typer.Option(help="Alpha of the adapter; the scaling is alpha / rank.")]
Dropout = Annotated[float, typer.Option(help="Dropout of the adapter's input.")]
Targets = Annotated[
    str, typer.Option(help="Layers to adapt: all-linear, a regex, or names with commas.")
]
BatchSize = Annotated[int, typer.Option(help="Rows that one device takes in one step.")]
Accumulate = Annotated[int, typer.Option(help="Batches that make one optimiser step.")]
ByLength = Annotated[
    bool, typer.Option("--group-by-length", help="Put rows of like length into one batch.")
]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate; by default 2e-4, or 2e-5 with --full.")
]
Full = Annotated[bool, typer.Option("--full", help="Train the layers' own weights.")]
Seed = Annotated[
    int, typer.Option(help="Seed of the split, the adapter, the order of rows and dropout.")
]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; 0 keeps none.")]
LoadIn = Annotated[str | None, typer.Option(help="4bit (NF4) or 8bit: pack the frozen base.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that --out holds.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model to run.")
]

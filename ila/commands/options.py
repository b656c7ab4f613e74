"""Options of the commands, each defined once: its type, its help and its default.

This file imports typer alone: ``ila --help`` loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ila.commands.config_file import read_config


def _say_version(asked: bool) -> None:
    if asked:
        from ila import __version__

        typer.echo(f"ila-kernels {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", help="Show the version and exit.", callback=_say_version, is_eager=True
    ),
]
Model = Annotated[str, typer.Option(help="Model: a hub id, a local folder, or a .gguf file.")]
Data = Annotated[
    str, typer.Option(help="Rows: a hub id, or a .json, .jsonl, .csv or .parquet file.")
]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file in the model's folder.")]
Split = Annotated[str, typer.Option(help="Split to read of a hub data set.")]
Limit = Annotated[
    int | None, typer.Option(help="Number of rows to use, from the first; by default all.")
]
HeldOut = Annotated[float, typer.Option(help="Share of rows to hold out for measuring the loss.")]
GroupCopies = Annotated[
    bool,
    typer.Option("--group-copies", help="Hold out near copies of a row together, or none of them."),
]
MaxLength = Annotated[int, typer.Option(help="Most tokens of a row; longer rows are cut.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the base: auto, bfloat16, float16 or float32.")]
Rank = Annotated[int, typer.Option(help="Rank of the adapter.")]
Alpha = Annotated[float, typer.Option(help="Alpha of the adapter; the scaling is alpha / rank.")]
Dropout = Annotated[float, typer.Option(help="Dropout of the adapter's input.")]
Targets = Annotated[
    str, typer.Option(help="Layers to adapt: all-linear, a regex, or names with commas.")
]
Adapter = Annotated[str, typer.Option(help="Kind of adapter: lora or adalora.")]
Tinit = Annotated[
    int | None, typer.Option("--tinit", help="Steps before AdaLoRA moves ranks; by default 0.")
]
Tfinal = Annotated[
    int | None, typer.Option("--tfinal", help="Last steps, with AdaLoRA's ranks fixed; default 0.")
]
DeltaT = Annotated[
    int | None, typer.Option("--deltaT", help="Steps between two moves of ranks; by default 1.")
]
OrthWeight = Annotated[
    float | None,
    typer.Option("--orth-reg-weight", help="Weight of AdaLoRA's regularisation; by default 0.5."),
]
RsLora = Annotated[
    bool, typer.Option("--use-rslora", help="Scale LoRA by alpha / √rank, as rsLoRA does.")
]
Dora = Annotated[
    bool, typer.Option("--use-dora", help="Train DoRA; PEFT's own code computes its layers.")
]
InitWeights = Annotated[
    str | None,
    typer.Option(
        help="Start of LoRA's A and B, as in PEFT: true, false, gaussian, orthogonal, mica, olora, "
        "pissa or pissa_niter_N."
    ),
]
LoraPlus = Annotated[
    float | None,
    typer.Option(help="LoRA+: learning rate of B over that of A; by default both are equal."),
]
BatchSize = Annotated[int, typer.Option(help="Rows that one device takes in one step.")]
Accumulate = Annotated[int, typer.Option(help="Batches that make one optimiser step.")]
ByLength = Annotated[
    bool, typer.Option("--group-by-length", help="Put rows of like length into one batch.")
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate; by default 2e-4 (more where a mask leaves few layers open), or "
        "2e-5 with --full."
    ),
]
Full = Annotated[bool, typer.Option("--full", help="Train the layers' own weights.")]
Seed = Annotated[
    int, typer.Option(help="Seed of the split, the adapter, the order of rows and dropout.")
]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; 0 keeps none.")]
LoadIn = Annotated[str | None, typer.Option(help="Packing of the frozen base: 4bit (NF4) or 8bit.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that --out holds.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model to run.")
]

# Options of `ila learn` and `ila train` for Trainer.
Config = Annotated[
    Path | None,
    typer.Option(
        callback=read_config,
        is_eager=True,
        help="YAML file with options and fields of TrainingArguments; options given here win.",
    ),
]
Set = Annotated[
    list[str],
    typer.Option(help="Any field of TrainingArguments, as NAME=VALUE; may be given again."),
]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Recompute blocks in backward to save memory; blocks of the frozen prefix are not.",
    ),
]
Warmup = Annotated[
    float | None,
    typer.Option(help="Steps of warm-up, or a share of all steps below 1; by default 3 %."),
]
Scheduler = Annotated[
    str | None, typer.Option(help="Schedule of the learning rate, such as cosine; linear without.")
]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay; by default 0.")]
Optim = Annotated[
    str | None, typer.Option(help="Optimiser by its name in transformers, such as adamw_8bit.")
]
Bf16 = Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Train under bf16 autocast.")]
ReportTo = Annotated[
    str | None, typer.Option(help="Where to report: tensorboard, wandb, …, with commas.")
]
EvalEvery = Annotated[
    int | None,
    typer.Option(help="Steps between two measurements of the held-out loss; by default none."),
]
Packing = Annotated[
    bool,
    typer.Option("--packing", help="Put the rows of a batch one after the other, unpadded."),
]

# Options of `ila learn`.
Method = Annotated[
    str,
    typer.Option(
        help="Method of scoring: path, ila, gate_gradient, or a baseline such as update_norm."
    ),
]
Stage1Steps = Annotated[int, typer.Option(help="Most steps of stage 1, which trains every layer.")]
Epsilon = Annotated[
    float,
    typer.Option(help="Change of the mean loss that ends stage 1 early; 0 turns this off."),
]
StabilityWindow = Annotated[int, typer.Option(help="Steps whose mean loss --epsilon compares.")]
Stage2Steps = Annotated[int, typer.Option(help="Steps of stage 2, which scores the layers.")]
ScoreInit = Annotated[
    float, typer.Option(help="Score s that each layer starts with; its gate is σ(s).")
]
ScoreLearningRate = Annotated[
    float, typer.Option(help="Learning rate of the scores; for --method ila.")
]

# Options of `ila select`.
MaskOrModel = Annotated[
    Path, typer.Argument(help="Folder of `ila learn`, a mask file, or a model.")
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Layers of a model to open: last:16, first:8, blocks:0,4-7, last-mlps:21, no-qk, "
        "names with commas, a regex for whole names, a file of Spectrum; or a ranking of "
        "weights, for --top: kappa (the default), snr or snr_overall."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="Write the open layers for another tool too, beside the mask: peft, axolotl or "
        "llamafactory."
    ),
]
Top = Annotated[float | None, typer.Option(help="Share of layers to keep open: the best ones.")]
Objective = Annotated[
    str,
    typer.Option(
        help="Worth of a set of layers: layers (the sum of their scores) or blocks (with "
        "diminishing returns in each block)."
    ),
]
Freeze = Annotated[float | None, typer.Option(help="Share of layers to close: the worst ones.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Most that the open layers may cost: time=0.6 (of the step with all open), "
        "memory=12GiB (held when backward begins, without checkpointing) or parameters=1M."
    ),
]
Speed = Annotated[
    str | None,
    typer.Option(help="File of `ila measure`, or the name of a GPU; for budgets of time."),
]
CountedModel = Annotated[
    str | None,
    typer.Option(help="Model to count the budget on; by default the model of the search."),
]
CountedRows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows of the counted step; by default as in the search."),
]
CountedLength = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a row of the counted step; by default as in the search."),
]
MaskOut = Annotated[
    Path | None, typer.Option(help="Mask file to write; by default beside the mask.")
]

# Options of `ila measure`.
RatesOut = Annotated[Path, typer.Option(help="File for the rates, such as speed.json.")]
RowLength = Annotated[int, typer.Option(help="Tokens of each row.")]
Rounds = Annotated[int, typer.Option(help="Steps to time under each mask.")]

# Options of `ila train`.
MaskFile = Annotated[
    Path | None,
    typer.Option(help="Mask file with the open layers; by default all are open."),
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps; by default 400.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the rows, in place of --steps.")]
CachePrefix = Annotated[
    bool,
    typer.Option(
        "--cache-prefix",
        help="Compute the frozen prefix once for each row, and keep it on disk.",
    ),
]
CacheFolder = Annotated[
    Path | None, typer.Option(help="Folder that keeps the cache for other runs too.")
]
CacheLimit = Annotated[float, typer.Option(help="Most GiB that the cache may take on disk.")]

# Options of the other commands.
Tokens = Annotated[int, typer.Option(help="Tokens of a step: rows times length.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="JSON file to write, beside the screen.")
]
All = Annotated[bool, typer.Option("--all", help="A line for each layer, instead of a grid.")]
LearnedRuns = Annotated[list[Path], typer.Argument(help="Two or more folders of `ila learn`.")]
TrainedRuns = Annotated[list[Path], typer.Argument(help="Folders of `ila train`.")]
TrainedRun = Annotated[Path, typer.Argument(help="Folder of `ila train`.")]
Merge = Annotated[
    bool, typer.Option("--merge", help="Merge the adapter into the dense base model.")
]
DemoSteps = Annotated[int, typer.Option(help="Optimiser steps of each training.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the old content of --out first.")]

# Options of `ila train` for a selection in the middle of the run.
SelectAt = Annotated[
    float | None,
    typer.Option(help="Share or number of steps after which the run selects its layers."),
]
LastBlocks = Annotated[
    str | None, typer.Option(help="Number of last blocks to keep open; with --select-at.")
]
Score = Annotated[
    str, typer.Option(help="Method that scores at --select-at: gate_gradient (free) or path.")
]
Closed = Annotated[
    str | None,
    typer.Option(
        help="Closed layers either keep their update, frozen, or drop it. By default drop with "
        "--mask alone, else keep."
    ),
]
StartFrom = Annotated[
    Path | None,
    typer.Option("--from", help="Adapter to go on from, such as RUN/adapter; with --mask."),
]

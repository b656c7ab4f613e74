"""Which options a command takes, and their defaults; ``takes`` makes its signature of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import typer

from ila.commands import options

# Name -> type with its help, and default; ... is an option that must be given.
Table = Mapping[str, tuple[Any, Any]]
# The values that a command got, by name.
Given = Mapping[str, Any]

MODEL: Table = {
    "model": (options.Model, ...),
    "gguf_file": (options.GgufFile, None),
    "dtype": (options.Dtype, "auto"),
    "load_in": (options.LoadIn, None),
    "trust_remote_code": (options.Trust, False),
}
ADAPTER: Table = {
    "rank": (options.Rank, 8),
    "alpha": (options.Alpha, 16.0),
    "dropout": (options.Dropout, 0.0),
    "target_modules": (options.Targets, "all-linear"),
    "adapter": (options.Adapter, "lora"),
    "tinit": (options.Tinit, None),
    "tfinal": (options.Tfinal, None),
    "deltaT": (options.DeltaT, None),
    "orth_reg_weight": (options.OrthWeight, None),
    "use_rslora": (options.RsLora, False),
    "use_dora": (options.Dora, False),
    "init_lora_weights": (options.InitWeights, None),
}
DATA: Table = {
    "data": (options.Data, ...),
    "split": (options.Split, "train"),
    "limit": (options.Limit, None),
    "held_out": (options.HeldOut, 0.1),
    "group_copies": (options.GroupCopies, False),
    "max_length": (options.MaxLength, 1024),
    "seed": (options.Seed, 0),
}
# The fields of `Inputs`.
INPUTS: Table = {**MODEL, **DATA, **ADAPTER}
RUN: Table = {
    "out": (options.Out, ...),
    "config": (options.Config, None),
    "full": (options.Full, False),
    "resume": (options.Resume, False),
    "save_every": (options.SaveEvery, 50),
}
# These become fields of `TrainingArguments`; see `trainer_fields`.
FIELDS: Table = {
    "gradient_accumulation": (options.Accumulate, None),
    "gradient_checkpointing": (options.Checkpointing, None),
    "group_by_length": (options.ByLength, False),
    "warmup": (options.Warmup, None),
    "scheduler": (options.Scheduler, None),
    "weight_decay": (options.WeightDecay, None),
    "optim": (options.Optim, None),
    "bf16": (options.Bf16, None),
    "report_to": (options.ReportTo, None),
}
TRAINER: Table = {
    "batch_size": (options.BatchSize, 8),
    "learning_rate": (options.LearningRate, None),
    "loraplus_lr_ratio": (options.LoraPlus, None),
    "eval_every": (options.EvalEvery, None),
    "packing": (options.Packing, False),
    **FIELDS,
    "set": (options.Set, ()),
}
SEARCH: Table = {
    "method": (options.Method, "path"),
    "stage1_steps": (options.Stage1Steps, 400),
    "epsilon": (options.Epsilon, 0.01),
    "stability_window": (options.StabilityWindow, 50),
    "stage2_steps": (options.Stage2Steps, 128),
    "score_init": (options.ScoreInit, 4.0),
    "score_learning_rate": (options.ScoreLearningRate, 1e-2),
}
TRAIN: Table = {
    "mask": (options.MaskFile, None),
    "steps": (options.Steps, None),
    "epochs": (options.Epochs, None),
    "select_at": (options.SelectAt, None),
    "top": (options.Top, None),
    "freeze": (options.Freeze, None),
    "blocks": (options.LastBlocks, None),
    "budget": (options.Budget, None),
    "objective": (options.Objective, "layers"),
    "speed": (options.Speed, None),
    "score": (options.Score, "gate_gradient"),
    "closed": (options.Closed, None),
    "start": (options.StartFrom, None),
    "cache_prefix": (options.CachePrefix, False),
    "cache_folder": (options.CacheFolder, None),
    "cache_limit_gib": (options.CacheLimit, 20.0),
}
# Options that choose layers, of `ila train` in the middle of a run.
CHOICE = ("top", "freeze", "blocks", "budget", "speed")
SELECT: Table = {
    "run": (options.MaskOrModel, ...),
    "config": (options.Config, None),
    "layers": (options.Layers, None),
    "top": (options.Top, None),
    "freeze": (options.Freeze, None),
    "budget": (options.Budget, None),
    "objective": (options.Objective, "layers"),
    "speed": (options.Speed, None),
    "model": (options.CountedModel, None),
    "batch_size": (options.CountedRows, None),
    "max_length": (options.CountedLength, None),
    "out": (options.MaskOut, None),
    "format": (options.Format, None),
    **{name: MODEL[name] for name in ("gguf_file", "load_in", "trust_remote_code")},
    "target_modules": ADAPTER["target_modules"],
}
MEASURE: Table = {
    **MODEL,
    "out": (options.RatesOut, ...),
    "batch_size": (options.BatchSize, 8),
    "max_length": (options.RowLength, 1024),
    "rounds": (options.Rounds, 5),
    "rank": ADAPTER["rank"],
    "dropout": ADAPTER["dropout"],
}
EXPLAIN: Table = {
    **MODEL,
    **ADAPTER,
    "mask": (options.MaskFile, None),
    "tokens": (options.Tokens, 4096),
    "long": (options.All, False),
    "json_file": (options.JsonFile, None),
}
TUNE: Table = {
    **{name: MODEL[name] for name in ("model", "gguf_file", "trust_remote_code")},
    "tokens": (options.Tokens, 8192),
    "rank": (options.Rank, 16),
    "dtype": (options.Dtype, "bfloat16"),
    "dropout": ADAPTER["dropout"],
}
REPORT: Table = {
    "runs": (options.TrainedRuns, ...),
    "out": (options.Out, Path("report")),
}


def takes(*tables: Table) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of tables; it gets them by name, after its context.

    >>> @takes({"out": (options.Out, ...)})
    ... def command(context, **given): ...
    >>> command.__signature__
    <Signature (context: typer..., *, out: ...
    """
    named = {name: option for table in tables for name, option in table.items()}
    parameters = [
        Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if default is ... else default,
                annotation=annotation,
            )
            for name, (annotation, default) in named.items()
        ),
    ]

    def with_signature(command: Callable[..., None]) -> Callable[..., None]:
        command.__signature__ = Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return with_signature

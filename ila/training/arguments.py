"""Make ``TrainingArguments`` of a stage, and check the values that a user sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ila.boundary import InputError, reading
from ila.runs.processes import processes

# TrainingArguments that a field of our configurations decides -> the name of that field.
_FIELDS = {
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "eval_strategy": "eval_every",
    "eval_steps": "eval_every",
    "resume_from_checkpoint": "resume",
}
_STEPS = ("max_steps", "num_train_epochs")
# Fixed values. ε-stability and the reports read the loss of every step, so every step is logged.
_FIXED = {
    "output_dir": "it is an argument of its own",
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "disable_tqdm": "the argument progress decides it",
    "save_only_model": "a run resumes from the optimiser's state in its checkpoints",
    "load_best_model_at_end": "a run keeps the weights of its last step",
    **dict.fromkeys(("hub_strategy", "hub_always_push"), "a run uploads once, at its end"),
    "hub_token": "a run writes its options into files; log in instead (hf auth login)",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "Trainer does not read it"),
}
# `ila train` alone uploads.
HUB_FIELDS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")
# Newer versions of transformers have the second names, older ones only the first.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def known_name(name: str) -> str:
    """Return the name that this version of transformers has for a field.

    >>> known_name("optim")
    'optim'
    """
    new = _RENAMED.get(name, name)
    return new if new in TrainingArguments.__dataclass_fields__ else name


def why_not(name: str, steps: str) -> str | None:
    """Say why a user must not set a field of ``TrainingArguments``; None if they may.

    Args:
        name: Name of the field.
        steps: Names of our own fields that hold the number of steps.
    """
    fields = _FIELDS | dict.fromkeys(_STEPS, steps)
    if name in fields:
        return f"set {fields[name]} instead"
    return _FIXED.get(name)


def check_training_args(extra: Mapping[str, object], steps: str) -> None:
    """Raise if ``training_args`` would override a field of the configuration, or are misspelt.

    Args:
        extra: The user's ``training_args``.
        steps: Names of the fields that hold the number of steps.

    Raises:
        ValueError: If a field or a fixed value decides a name of ``extra``, or a name is unknown.
        TypeError: If ``extra`` holds a value that JSON cannot express.
    """
    for name in extra:
        reason = why_not(name, steps)
        if name in HUB_FIELDS:
            reason = "`ila train` alone uploads; see peft_model.push_to_hub in Python"
        if reason is not None:
            raise ValueError(f"training_args must not set {name!r}: {reason}")
    unknown = sorted(set(extra) - set(TrainingArguments.__dataclass_fields__))
    if unknown:
        close = get_close_matches(unknown[0], TrainingArguments.__dataclass_fields__, 1)
        hint = f"; {close[0]} is close to {unknown[0]}" if close else ""
        raise ValueError(
            f"training_args has names that TrainingArguments does not know: {unknown}{hint}"
        )
    json.dumps(dict(extra))  # a run keeps them with its results


def arguments(
    output_dir: Path,
    *,
    steps: int,
    save_every: int | None,
    extra: Mapping[str, object],
    eval_every: int | None = None,
    **own: object,
) -> TrainingArguments:
    """Make the TrainingArguments of one stage.

    Args:
        output_dir: Folder of the checkpoints.
        steps: Optimiser steps.
        save_every: Steps between checkpoints; None saves none.
        extra: The user's ``training_args``; they win over the defaults here.
        eval_every: Steps between evaluations; None evaluates never.
        **own: Settings of this stage, by the names of ``TrainingArguments``.

    Raises:
        ValueError: If transformers refuses a value, or a package that a value needs is missing.
    """
    ranks = processes()
    settings: dict[str, object] = {
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 500,
        "save_total_limit": 2,
        "eval_strategy": "steps" if eval_every else "no",
        "eval_steps": eval_every,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        # Closed layers have no parameters that require grad, so every such parameter is used.
        "ddp_find_unused_parameters": False,
        # Trainer takes bf16 on a CPU only if told to use one.
        "use_cpu": ranks.device.type == "cpu" and (ranks.num_processes > 1 or "bf16" in extra),
        **own,
        **{known_name(name): value for name, value in extra.items()},
    }
    with _reading(extra):
        made = TrainingArguments(
            output_dir=str(output_dir), max_steps=steps, logging_steps=1, disable_tqdm=True,
            **settings,
        )  # fmt: skip
    return made


def check_usable(args: TrainingArguments, extra: Mapping[str, object], model: nn.Module) -> None:
    """Raise if the optimiser, schedule or reports that a user asks for cannot be made.

    Trainer makes them only in the middle of its start, when a run has claimed its folder.

    Args:
        args: Arguments that ``arguments`` made.
        extra: The user's ``training_args``.
        model: Model to train.

    Raises:
        ValueError: If one of them cannot be made; the message has the reason.
    """
    with _reading(extra):
        Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()


@contextmanager
def _reading(extra: Mapping[str, object]) -> Iterator[None]:
    """Blame the user's ``training_args`` for errors of transformers inside the ``with``."""
    text = ", ".join(f"{name}={value!r}" for name, value in extra.items())
    try:
        with reading(text, "training_args"):
            yield
    except ImportError as error:
        raise InputError(f"training_args {text}: a package is missing: {error}") from error

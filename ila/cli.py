"""The ``ila`` command: options in, functions of ``ila.commands``, tables out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ila.boundary import bug_report, described
from ila.commands.options import (
    Accumulate,
    Alpha,
    BatchSize,
    ByLength,
    Data,
    Dropout,
    Dtype,
    Full,
    GgufFile,
    HeldOut,
    LearningRate,
    Limit,
    LoadIn,
    MaxLength,
    Model,
    Out,
    Rank,
    Resume,
    SaveEvery,
    Seed,
    Split,
    Targets,
    Trust,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Learn which linear layers matter for a data set, and train only those.",
    pretty_exceptions_enable=False,
)
# Paths, names and data are printed as they are: brackets in them are no markup.
screen = Console(markup=False)


@app.command()
def learn(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    full: Full = False,
    method: Annotated[
        str,
        typer.Option(
            help="Method that scores: path, ila, gate_gradient, or a baseline such as update_norm."
        ),
    ] = "path",
    stage1_steps: Annotated[
        int, typer.Option(help="Most steps of stage 1, which trains every layer.")
    ] = 400,
    epsilon: Annotated[
        float, typer.Option(help="Change of the loss at which stage 1 ends; 0 never ends it.")
    ] = 0.01,
    stability_window: Annotated[
        int, typer.Option(help="Steps over which that loss is averaged.")
    ] = 50,
    stage2_steps: Annotated[int, typer.Option(help="Steps of stage 2, which scores.")] = 128,
    score_init: Annotated[
        float, typer.Option(help="Score s that each layer starts with; its gate is σ(s).")
    ] = 4.0,
    score_learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the scores; for --method ila.")
    ] = 1e-2,
    gguf_file: GgufFile = None,
    split: Split = "train",
    limit: Limit = None,
    held_out: HeldOut = 0.1,
    max_length: MaxLength = 1024,
    dtype: Dtype = "auto",
    load_in: LoadIn = None,
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    batch_size: BatchSize = 8,
    gradient_accumulation: Accumulate = 1,
    group_by_length: ByLength = False,
    learning_rate: LearningRate = None,
    seed: Seed = 0,
    save_every: SaveEvery = 50,
    resume: Resume = False,
    trust_remote_code: Trust = False,
) -> None:
    """Learn how much each linear layer matters for a data set."""
    from ila.commands.inputs import Inputs
    from ila.commands.learn import learn as run
    from ila.search.learn import SearchConfig

    usual = _usual_rate(context, full)
    inputs = Inputs(
        model=model,
        data=data,
        gguf_file=gguf_file,
        split=split,
        limit=limit,
        held_out=held_out,
        max_length=max_length,
        dtype=dtype,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        seed=seed,
        trust_remote_code=trust_remote_code,
        load_in=load_in,
    )
    _leave_the_screen()
    config = SearchConfig(
        method=method,
        stage1_steps=stage1_steps,
        epsilon=epsilon,
        stability_window=stability_window,
        learning_rate=usual if learning_rate is None else learning_rate,
        stage2_steps=stage2_steps,
        score_init=score_init,
        score_learning_rate=score_learning_rate,
        batch_size=batch_size,
        save_every=save_every or None,
        training_args=_trainer(gradient_accumulation, group_by_length),
    )
    mask, data_note = run(inputs, config, out, full=full, resume=resume)
    screen.print(data_note, highlight=False)
    _print_search(mask)
    screen.print(f"Mask and heat map in {out}; next: ila select {out} --top 0.3", soft_wrap=True)


@app.command()
def select(
    run: Annotated[Path, typer.Argument(help="Folder of `ila learn`, or a mask file.")],
    top: Annotated[float | None, typer.Option(help="Share of layers to keep, the best.")] = None,
    freeze: Annotated[
        float | None, typer.Option(help="Share of layers to close, the worst.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Most that the open layers may cost: time=0.6 (of the step with all open), "
            "memory=12GiB (held when backward begins, without checkpointing) or parameters=1M."
        ),
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(help="File of `ila measure`, or the name of a GPU; for budgets of time."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to count the budget on; by default the one the mask was learned on."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a step to count; by default those of the search."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a row to count; by default those of the search."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Mask file to write; by default beside the mask.")
    ] = None,
) -> None:
    """Choose the layers to train from a learned mask: a share of them, or what a budget buys.

    A budget weighs importance (the sum of the scores) against cost: how deep backward goes, what
    it passes, what each layer computes and keeps. The plain top-k of that cost is printed beside
    it, and a picture of importance against cost is drawn beside the mask.
    """
    from ila.commands import select_share

    if budget is not None and top is None and freeze is None:
        from ila.commands.select_budget import StepSizes, select_within

        step = StepSizes(model, batch_size, max_length)
        found = select_within(run, budget, speed=speed, step=step, out=out)
        screen.print(found.text(), soft_wrap=True, highlight=False)
        return
    if budget is not None:
        raise ValueError("give exactly one of --top, --freeze and --budget")
    options = {"--speed": speed, "--model": model, "--batch-size": batch_size}
    for name, value in {**options, "--max-length": max_length}.items():
        if value is not None:
            raise ValueError(f"{name} does nothing without --budget")
    mask, path = select_share.select(run, top=top, freeze=freeze, out=out)
    screen.print(f"{len(mask.open)} of {len(mask)} layers open: {path}", soft_wrap=True)


@app.command()
def measure(
    model: Model,
    out: Annotated[Path, typer.Option(help="File for the rates, such as speed.json.")],
    batch_size: BatchSize = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of each row.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Steps to time under each mask.")] = 5,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    load_in: LoadIn = None,
    rank: Rank = 8,
    dropout: Dropout = 0.0,
    trust_remote_code: Trust = False,
) -> None:
    """Time training steps here under a dozen masks, for `ila select --budget time=…`."""
    from ila.commands.inputs import Inputs
    from ila.commands.measure import measure as run

    inputs = Inputs(
        model,
        data="",
        gguf_file=gguf_file,
        dtype=dtype,
        load_in=load_in,
        rank=rank,
        dropout=dropout,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    speed = run(inputs, out, rows=batch_size, rounds=rounds)
    whole = speed.measured["steps"]["all layers"]["measured_ms"]
    screen.print(
        f"All layers: {whole:.1f} ms a step, of which {speed.fixed_ms / whole:.0%} no mask saves; "
        f"the worst error of a step left out of the fit is {speed.worst_error:.1%}\n"
        f"Rates in {out}; next: ila select RUN --budget time=0.6 --speed {out}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def train(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    mask: Annotated[
        Path | None, typer.Option(help="Mask file that says which layers are open; without it all.")
    ] = None,
    full: Full = False,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 400,
    cache_prefix: Annotated[
        bool,
        typer.Option(
            "--cache-prefix",
            help="Compute the frozen prefix once for each row, and keep it on disk.",
        ),
    ] = False,
    cache_folder: Annotated[
        Path | None, typer.Option(help="Folder that keeps the cache for other runs too.")
    ] = None,
    cache_limit_gib: Annotated[
        float, typer.Option(help="Most GiB that the cache may take on disk.")
    ] = 20.0,
    gguf_file: GgufFile = None,
    split: Split = "train",
    limit: Limit = None,
    held_out: HeldOut = 0.1,
    max_length: MaxLength = 1024,
    dtype: Dtype = "auto",
    load_in: LoadIn = None,
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    batch_size: BatchSize = 8,
    gradient_accumulation: Accumulate = 1,
    group_by_length: ByLength = False,
    learning_rate: LearningRate = None,
    seed: Seed = 0,
    save_every: SaveEvery = 50,
    resume: Resume = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train the open layers of a mask: into a plain PEFT adapter, or their own weights."""
    from ila.commands.inputs import Inputs
    from ila.commands.train import train_selected
    from ila.reports.tables import runs_table
    from ila.training.config import TrainConfig

    usual = _usual_rate(context, full)
    inputs = Inputs(
        model=model,
        data=data,
        gguf_file=gguf_file,
        split=split,
        limit=limit,
        held_out=held_out,
        max_length=max_length,
        dtype=dtype,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        seed=seed,
        trust_remote_code=trust_remote_code,
        load_in=load_in,
    )
    _leave_the_screen()
    if cache_folder is not None and not cache_prefix:
        raise ValueError("--cache-folder says where --cache-prefix keeps its file; give both")
    config = TrainConfig(
        steps=steps,
        learning_rate=usual if learning_rate is None else learning_rate,
        batch_size=batch_size,
        save_every=save_every or None,
        cache_prefix=cache_prefix if cache_folder is None else str(cache_folder),
        cache_limit_gib=cache_limit_gib,
        training_args=_trainer(gradient_accumulation, group_by_length),
    )
    metrics, data_note = train_selected(
        inputs, config, out, mask_file=mask, full=full, resume=resume
    )
    screen.print(data_note, highlight=False)
    screen.print(runs_table([metrics]))
    if full:
        note = f"Changed weights in {out}; ila export {out} --merge --out FOLDER writes the model"
    else:
        note = f"Adapter in {out}; PeftModel.from_pretrained(base, {str(out)!r}) loads it"
    screen.print(note, soft_wrap=True)


@app.command()
def explain(
    model: Model,
    mask: Annotated[
        Path | None, typer.Option(help="Mask file that says which layers are open; without it all.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a step: rows times length.")] = 4096,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    load_in: LoadIn = None,
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write as well.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Say what each layer computes, whether it is in the frozen prefix, and what it keeps.

    Bytes are those of the linear layers; `ila select --budget memory=…` counts the whole step.
    """
    from ila.commands.explain import explain_layers
    from ila.commands.inputs import Inputs
    from ila.runs.atomic import write_json_atomic

    inputs = Inputs(
        model,
        data="",
        gguf_file=gguf_file,
        dtype=dtype,
        load_in=load_in,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        trust_remote_code=trust_remote_code,
    )
    found = explain_layers(inputs, tokens, mask_file=mask)
    screen.print(found.table())
    if json_file is not None:
        write_json_atomic(json_file, found.as_dict())


@app.command()
def tune(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Tokens of a step: rows times length.")] = 8192,
    rank: Rank = 16,
    dtype: Dtype = "bfloat16",
    dropout: Dropout = 0.0,
    gguf_file: GgufFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure on this machine's GPU which code of the op is fastest, and let `auto` choose by it.

    Takes seconds of GPU time, and once the time to compile the kernels. Verdicts are kept in the
    user's cache folder.
    """
    import torch

    from ila.commands.tune import tune as run

    if not torch.cuda.is_available():
        _complain("PyTorch sees no GPU here, so nothing was measured", led_by="error: ")
        raise typer.Exit(1)
    tuned = run(
        model,
        tokens=tokens,
        rank=rank,
        dtype=dtype,
        dropout=dropout,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
    )
    screen.print(str(tuned), highlight=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more folders of `ila learn`.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write as well.")
    ] = None,
) -> None:
    """Say how far learned masks agree, beside what chance gives."""
    from ila.masks.agreement import compare_table
    from ila.masks.mask import LayerMask
    from ila.reports.tables import render_compare
    from ila.runs.atomic import write_json_atomic

    if len(runs) < 2:
        raise ValueError(f"give at least two runs to compare, got {len(runs)}")
    names = _distinct_names(runs)
    rows = compare_table({name: LayerMask.load(run) for name, run in zip(names, runs, strict=True)})
    screen.print(render_compare(rows))
    if json_file is not None:
        write_json_atomic(json_file, rows)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `ila train`.")],
    out: Out = Path("report"),
) -> None:
    """Compare finished trainings: held-out loss, time, memory, parameters."""
    from ila.commands.report import report as run
    from ila.reports.tables import runs_table

    screen.print(runs_table(run(runs, out)))
    screen.print(f"Table and figure in {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of `ila train`.")],
    out: Out,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the dense base model.")
    ] = False,
) -> None:
    """Write a trained adapter elsewhere, alone or merged into its model."""
    from ila.commands.export import export as write

    written = write(run, out, merge=merge)
    screen.print(f"{written} in {out}")


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    steps: Annotated[
        int, typer.Option(help="Optimiser steps of each stage and each training.")
    ] = 30,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove the old content of --out first.")
    ] = False,
) -> None:
    """Run the whole path on SmolLM2-135M and three small instruction sets."""
    from ila.commands.demo import run_demo

    run_demo(out, steps=steps, fresh=fresh, screen=screen)


def _leave_the_screen() -> None:
    """Let the main process alone print."""
    from ila.runs.processes import leave_the_screen_to_the_main_process

    screen.quiet = leave_the_screen_to_the_main_process()


def _usual_rate(context: typer.Context, full: bool) -> float:
    """The learning rate where none is given; raise if an option of adapters is, beside --full."""
    if full:
        _refuse(context, ("rank", "alpha", "dropout", "load_in"), "--full trains no adapter")
    return 2e-5 if full else 2e-4


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Raise if one of these options was given: it would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} does nothing here: {why}")


def _trainer(steps: int, group_by_length: bool) -> dict[str, Any]:
    """The options that ``TrainingArguments`` take."""
    from ila.training.batches import by_length

    if steps < 1:
        raise ValueError(f"gradient_accumulation must be ≥ 1, got {steps}")
    accumulation = {} if steps == 1 else {"gradient_accumulation_steps": steps}
    return accumulation | (by_length() if group_by_length else {})


def _distinct_names(runs: list[Path]) -> list[str]:
    """Last part of each path, or the whole path where that would be ambiguous."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _print_search(mask: Any) -> None:
    search, held = mask.provenance["search"], mask.provenance["held_out_loss"]
    stage1, spread = search["stage1"], search["spread"]
    if not stage1["steps"]:
        screen.print(f"No stage 1: method {search['config']['method']} needs none", highlight=False)
    else:
        losses = (held[name] for name in ("before", "after_stage1"))
        before, after = ("–" if loss is None else f"{loss:.3f}" for loss in losses)
        screen.print(
            f"Stage 1: {stage1['steps']} steps (stopped: {stage1['stopped']}), "
            f"training loss {stage1['first_window_loss']:.3f} → {stage1['last_window_loss']:.3f} "
            f"(means of the first and the last {stage1['loss_window']} steps)"
            f", held out {before} → {after}",
            highlight=False,
        )
    screen.print(
        f"Stage 2: {search['stage2']['steps']} steps; scores of {len(mask)} layers from "
        f"{spread['min']:.4g} to {spread['max']:.4g}, standard deviation {spread['std']:.3g}",
        highlight=False,
    )


_GOES_ON = {
    "learn": "; the same command with --resume goes on",
    "train": "; the same command with --resume goes on",
    "demo": "; the same command goes on",
}


def main() -> None:
    """Run the command; an error of the user's is one line on stderr and exit code 2.

    A bug of ours prints its traceback and exits with 1; see ``ila.boundary``.
    """
    # peft asks transformers by a name that transformers 5 is renaming; nothing a user can change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*is deprecated")
    try:
        app()
    except SystemExit as done:
        if done.code == 130:  # typer's answer to Ctrl-C, given without a word
            command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
            _complain(f"interrupted{_GOES_ON.get(command, '')}")
        raise
    except Exception as error:
        sys.exit(_answer(error))
    finally:
        if "ila.runs.processes" in sys.modules:
            sys.modules["ila.runs.processes"].leave_process_group()


def _answer(error: Exception) -> int:
    """Say an error, unless the main process says it; return the exit code."""
    said = described(error)
    if not getattr(error, "raised_by_main_process", False):
        if said is None:
            print(bug_report(error), file=sys.stderr)
        else:
            _complain(said, led_by="error: ")
    return 1 if said is None else 2


def _complain(text: str, led_by: str = "") -> None:
    line = Text.assemble((led_by, "bold red"), text)
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()

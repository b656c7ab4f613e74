"""The ``ila`` command: read options, call ``ila.commands``, print tables."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from ila.boundary import bug_report, described
from ila.commands import options

if TYPE_CHECKING:
    from ila.search.selection import Selection

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Learn which linear layers matter for a data set, and train only those.",
    pretty_exceptions_enable=False,
)
# Without markup: paths, names and data may hold brackets.
screen = Console(markup=False)


@app.command()
def learn(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    out: options.Out,
    full: options.Full = False,
    method: options.Method = "path",
    stage1_steps: options.Stage1Steps = 400,
    epsilon: options.Epsilon = 0.01,
    stability_window: options.StabilityWindow = 50,
    stage2_steps: options.Stage2Steps = 128,
    score_init: options.ScoreInit = 4.0,
    score_learning_rate: options.ScoreLearningRate = 1e-2,
    gguf_file: options.GgufFile = None,
    split: options.Split = "train",
    limit: options.Limit = None,
    held_out: options.HeldOut = 0.1,
    max_length: options.MaxLength = 1024,
    dtype: options.Dtype = "auto",
    load_in: options.LoadIn = None,
    rank: options.Rank = 8,
    alpha: options.Alpha = 16.0,
    dropout: options.Dropout = 0.0,
    target_modules: options.Targets = "all-linear",
    batch_size: options.BatchSize = 8,
    gradient_accumulation: options.Accumulate = 1,
    group_by_length: options.ByLength = False,
    learning_rate: options.LearningRate = None,
    seed: options.Seed = 0,
    save_every: options.SaveEvery = 50,
    resume: options.Resume = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Learn how much each linear layer matters for a data set."""
    from ila.commands.inputs import Inputs
    from ila.commands.learn import learn as run
    from ila.reports.texts import search_text
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
    screen.print(search_text(mask), highlight=False)
    screen.print(f"Mask and heat map in {out}; next: ila select {out} --top 0.3", soft_wrap=True)


@app.command()
def select(
    run: options.LearnedRun,
    top: options.Top = None,
    freeze: options.Freeze = None,
    budget: options.Budget = None,
    speed: options.Speed = None,
    model: options.CountedModel = None,
    batch_size: options.CountedRows = None,
    max_length: options.CountedLength = None,
    out: options.MaskOut = None,
) -> None:
    """Choose the layers to train from a learned mask: a share, or the best set for a budget.

    A budget weighs importance (the sum of the scores) against cost: the depth of backward, the
    layers that it passes, and the time and memory of each open layer. The command prints the plain
    top-k of the same cost, and draws importance against cost beside the mask.
    """
    from ila.commands import select_share

    if budget is not None and top is None and freeze is None:
        from ila.commands.select_budget import StepSizes, select_within

        step = StepSizes(model, batch_size, max_length)
        selected = select_within(run, budget, speed=speed, step=step, out=out)
        screen.print(selected.text(), soft_wrap=True, highlight=False)
        return
    if budget is not None:
        raise ValueError("give exactly one of --top, --freeze and --budget")
    of_budgets = {
        "--speed": speed,
        "--model": model,
        "--batch-size": batch_size,
        "--max-length": max_length,
    }
    for name, value in of_budgets.items():
        if value is not None:
            raise ValueError(f"{name} does nothing without --budget")
    mask, path = select_share.select(run, top=top, freeze=freeze, out=out)
    screen.print(f"{len(mask.open)} of {len(mask)} layers open: {path}", soft_wrap=True)


@app.command()
def measure(
    model: options.Model,
    out: options.RatesOut,
    batch_size: options.BatchSize = 8,
    max_length: options.RowLength = 1024,
    rounds: options.Rounds = 5,
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    load_in: options.LoadIn = None,
    rank: options.Rank = 8,
    dropout: options.Dropout = 0.0,
    trust_remote_code: options.Trust = False,
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
    head = speed.per_label_ms * batch_size * max_length
    screen.print(
        f"All layers, every token a label: {whole:.1f} ms a step, of which no mask saves "
        f"{(speed.fixed_ms + head) / whole:.0%}; {head / whole:.0%} are head and loss, which pay "
        "for answers alone; the worst error of a step left out of the fit is "
        f"{speed.worst_error:.1%}\n"
        f"Rates in {out}; next: ila select RUN --budget time=0.6 --speed {out}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def train(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    out: options.Out,
    mask: options.MaskFile = None,
    select_at: options.SelectAt = None,
    top: options.Top = None,
    freeze: options.Freeze = None,
    blocks: options.LastBlocks = None,
    budget: options.Budget = None,
    speed: options.Speed = None,
    score: options.Score = "gate_gradient",
    closed: options.Closed = None,
    start: options.StartFrom = None,
    full: options.Full = False,
    steps: options.Steps = 400,
    cache_prefix: options.CachePrefix = False,
    cache_folder: options.CacheFolder = None,
    cache_limit_gib: options.CacheLimit = 20.0,
    gguf_file: options.GgufFile = None,
    split: options.Split = "train",
    limit: options.Limit = None,
    held_out: options.HeldOut = 0.1,
    max_length: options.MaxLength = 1024,
    dtype: options.Dtype = "auto",
    load_in: options.LoadIn = None,
    rank: options.Rank = 8,
    alpha: options.Alpha = 16.0,
    dropout: options.Dropout = 0.0,
    target_modules: options.Targets = "all-linear",
    batch_size: options.BatchSize = 8,
    gradient_accumulation: options.Accumulate = 1,
    group_by_length: options.ByLength = False,
    learning_rate: options.LearningRate = None,
    seed: options.Seed = 0,
    save_every: options.SaveEvery = 50,
    resume: options.Resume = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Train the open layers of a mask: into a plain PEFT adapter, or their own weights.

    With --select-at, search, selection and training are one run: all layers train at first, then
    the layers that --top, --freeze, --blocks or --budget leave open, with the same schedule.
    """
    from ila.commands.inputs import Inputs
    from ila.reports.tables import runs_table
    from ila.training.config import TrainConfig

    selection = _selection(
        select_at,
        mask,
        full,
        closed or "keep",
        score,
        top=top,
        freeze=freeze,
        blocks=blocks,
        budget=budget,
        speed=speed,
    )
    usual = _usual_rate(context, full)
    if start is not None and (full or selection is not None):
        raise ValueError("--from goes on from an adapter with --mask; it does nothing here")
    if closed is not None and selection is None and (mask is None or full):
        raise ValueError("--closed says how layers close; give --mask or --select-at")
    if learning_rate is None and mask is not None and not full and start is None:
        usual = _rate_for(mask)
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
    if selection is not None:
        from ila.commands.train_once import train_once

        metrics, data_note = train_once(inputs, config, selection, out, resume=resume)
    else:
        from ila.commands.train import train_selected

        metrics, data_note = train_selected(
            inputs,
            config,
            out,
            mask_file=mask,
            closed=closed or ("drop" if start is None else "keep"),
            start=start,
            full=full,
            resume=resume,
        )
    screen.print(data_note, highlight=False)
    screen.print(runs_table([metrics]))
    if selection is not None:
        from ila.reports.phases import phases_text

        screen.print(phases_text(metrics), soft_wrap=True, highlight=False)
    if full:
        note = f"Changed weights in {out}; ila export {out} --merge --out FOLDER writes the model"
    else:
        note = f"Adapter in {out}; PeftModel.from_pretrained(base, {str(out)!r}) loads it"
    screen.print(note, soft_wrap=True)


@app.command()
def explain(
    model: options.Model,
    mask: options.MaskFile = None,
    tokens: options.Tokens = 4096,
    gguf_file: options.GgufFile = None,
    dtype: options.Dtype = "auto",
    load_in: options.LoadIn = None,
    rank: options.Rank = 8,
    alpha: options.Alpha = 16.0,
    dropout: options.Dropout = 0.0,
    target_modules: options.Targets = "all-linear",
    long: options.All = False,
    json_file: options.JsonFile = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Show the path of each layer, whether it is in the frozen prefix, and the bytes it keeps.

    The bytes count linear layers only; `ila select --budget memory=…` counts the whole step.
    """
    from ila.commands.explain import explain_layers
    from ila.commands.inputs import Inputs
    from ila.reports.explained import explained
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
    explanation = explain_layers(inputs, tokens, mask_file=mask)
    screen.print(explanation.table() if long else explained(explanation))
    if json_file is not None:
        write_json_atomic(json_file, explanation.as_dict())


@app.command()
def tune(
    model: options.Model,
    tokens: options.Tokens = 8192,
    rank: options.Rank = 16,
    dtype: options.Dtype = "bfloat16",
    dropout: options.Dropout = 0.0,
    gguf_file: options.GgufFile = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Measure on this machine's GPU which code of the op is fastest, and let `auto` choose by it.

    It takes seconds of GPU time, and once the time to compile the kernels. The verdicts go into the
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
    runs: options.LearnedRuns,
    json_file: options.JsonFile = None,
) -> None:
    """Compare learned masks: their agreement, beside the agreement by chance."""
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
    runs: options.TrainedRuns,
    out: options.Out = Path("report"),
) -> None:
    """Compare finished trainings: held-out loss, time, memory, parameters."""
    from ila.commands.report import report as run
    from ila.reports.tables import runs_table

    screen.print(runs_table(run(runs, out)))
    screen.print(f"Table and figure in {out}")


@app.command()
def export(
    run: options.TrainedRun,
    out: options.Out,
    merge: options.Merge = False,
) -> None:
    """Write a trained adapter elsewhere, alone or merged into its model."""
    from ila.commands.export import export as write

    written = write(run, out, merge=merge)
    screen.print(f"{written} in {out}")


@app.command()
def demo(
    out: options.Out = Path("runs/demo"),
    steps: options.DemoSteps = 72,
    fresh: options.Fresh = False,
) -> None:
    """Train SmolLM2-135M in one run with a selection, beside PEFT on all layers."""
    from ila.commands.demo import run_demo

    run_demo(out, steps=steps, fresh=fresh, screen=screen)


def _leave_the_screen() -> None:
    """Let the main process alone print."""
    from ila.runs.processes import leave_the_screen_to_the_main_process

    screen.quiet = leave_the_screen_to_the_main_process()


def _usual_rate(context: typer.Context, full: bool) -> float:
    """Return the default learning rate; raise if --full meets an option of adapters."""
    if full:
        _refuse(context, ("rank", "alpha", "dropout", "load_in"), "--full trains no adapter")
    from ila.training.rates import usual_rate

    return usual_rate(full=full)


def _rate_for(mask: Path) -> float:
    """Return the learning rate for the layers that a mask opens; print an unusual one."""
    from ila.masks.mask import LayerMask
    from ila.training.rates import usual_rate

    opened = LayerMask.load(mask)
    rate = usual_rate(len(opened.open) / len(opened))
    if rate != usual_rate():
        screen.print(
            f"Learning rate {rate:.3g}: with {len(opened.open)} of {len(opened)} layers open they "
            f"want {rate / usual_rate():.2g} times the usual one; --learning-rate sets another",
            soft_wrap=True,
            highlight=False,
        )
    return rate


def _selection(
    at: float | None,
    mask: Path | None,
    full: bool,
    closed: str,
    score: str,
    **choice: float | str | None,
) -> Selection | None:
    """Return the selection that the options describe; None without --select-at."""
    if at is None:
        given = [name for name, value in choice.items() if value is not None]
        if given:
            raise ValueError(f"--{given[0]} selects in the middle of a run; give --select-at too")
        return None
    if mask is not None or full:
        other = "--full" if full else "--mask"
        raise ValueError(f"--select-at selects layers of an adapter itself; leave out {other}")
    from ila.price.choice import Choice
    from ila.search.selection import Selection

    when = int(at) if at >= 1 and at == int(at) else at
    return Selection(Choice(**choice), when, closed, score)


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Raise if the user gave one of these options: it would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} does nothing here: {why}")


def _trainer(steps: int, group_by_length: bool) -> dict[str, str | int | bool]:
    """Return the options that ``TrainingArguments`` take."""
    from ila.training.batches import by_length

    if steps < 1:
        raise ValueError(f"gradient_accumulation must be ≥ 1, got {steps}")
    accumulation = {} if steps == 1 else {"gradient_accumulation_steps": steps}
    return accumulation | (by_length() if group_by_length else {})


def _distinct_names(runs: list[Path]) -> list[str]:
    """Return the last part of each path, or the whole path if two last parts are equal."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


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

"""The ``ila`` command: read options, call ``ila.commands``, print tables."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ila.boundary import bug_report, described
from ila.commands import options
from ila.commands.option_tables import (
    EXPLAIN,
    INPUTS,
    MEASURE,
    RUN,
    SEARCH,
    SELECT,
    TRAIN,
    TRAINER,
    TUNE,
    takes,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Learn which linear layers matter for a data set, and train only those.",
    pretty_exceptions_enable=False,
)
# Without markup: paths, names and data may hold brackets.
screen = Console(markup=False)


@app.callback()
def _every_command(version: options.Version = False) -> None:
    """Take the options that stand before a command."""


@app.command()
@takes(INPUTS, RUN, SEARCH, TRAINER)
def learn(context: typer.Context, **given: Any) -> None:
    """Learn how much each linear layer matters for a data set."""
    from ila.commands.learn import learn as run
    from ila.commands.settings import search_settings
    from ila.reports.texts import search_text

    _leave_the_screen()
    config, inputs, written = search_settings(context, given)
    mask, data_note = run(
        inputs, config, given["out"], full=given["full"], resume=given["resume"], written=written
    )
    screen.print(data_note, highlight=False)
    screen.print(search_text(mask), highlight=False)
    out = given["out"]
    made = _with_picture(f"Mask and heat map in {out}", f"Mask in {out}")
    screen.print(f"{made}; next: ila select {out} --top 0.3", soft_wrap=True)


@app.command()
@takes(SELECT)
def select(context: typer.Context, run: Path, **given: Any) -> None:
    """Choose the layers to train: cut a learned mask, or make one for a model.

    A budget weighs importance (--objective) against cost: the depth of backward, the layers that it
    passes, and the time and memory of each open layer. The command prints the plain top-k of the
    same cost, and draws importance against cost beside the mask.
    """
    from ila.commands.select import select as run_select

    for line in run_select(run, given):
        screen.print(line, soft_wrap=True, highlight=False)


@app.command()
@takes(MEASURE)
def measure(context: typer.Context, out: Path, batch_size: int, rounds: int, **given: Any) -> None:
    """Time training steps here under a dozen masks, for `ila select --budget time=…`."""
    from ila.commands.inputs import Inputs
    from ila.commands.measure import measure as run

    speed = run(Inputs(data="", **given), out, rows=batch_size, rounds=rounds)
    whole = speed.measured["steps"]["all layers"]["measured_ms"]
    head = speed.per_label_ms * batch_size * given["max_length"]
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
@takes(INPUTS, RUN, TRAIN, TRAINER)
def train(context: typer.Context, **given: Any) -> None:
    """Train the open layers of a mask: into a plain PEFT adapter, or their own weights.

    With --select-at, search, selection and training are one run: all layers train at first, then
    the layers that --top, --freeze, --blocks or --budget leave open, with the same schedule.
    """
    from ila.commands.settings import train_settings
    from ila.reports.tables import runs_table

    _leave_the_screen()
    settings = train_settings(context, given)
    if settings.note:
        screen.print(settings.note, soft_wrap=True, highlight=False)
    metrics, data_note = settings.run()
    screen.print(data_note, highlight=False)
    screen.print(runs_table([metrics]))
    if settings.selection is not None:
        from ila.reports.phases import phases_text

        screen.print(phases_text(metrics), soft_wrap=True, highlight=False)
        if said := _with_picture("", "The mask is written"):
            screen.print(said, soft_wrap=True)
    out = given["out"]
    if given["full"]:
        note = f"Changed weights in {out}; ila export {out} --merge --out FOLDER writes the model"
    else:
        note = f"Adapter in {out}; PeftModel.from_pretrained(base, {str(out)!r}) loads it"
    screen.print(note, soft_wrap=True)


@app.command()
@takes(EXPLAIN)
def explain(
    context: typer.Context,
    mask: Path | None,
    tokens: int,
    long: bool,
    json_file: Path | None,
    **given: Any,
) -> None:
    """Show the path of each layer, whether it is in the frozen prefix, and the bytes it keeps.

    The bytes count linear layers only; `ila select --budget memory=…` counts the whole step.
    """
    from ila.commands.explain import explain_layers
    from ila.commands.inputs import Inputs
    from ila.reports.explained import explained
    from ila.runs.atomic import write_json_atomic

    explanation = explain_layers(Inputs(data="", **given), tokens, mask_file=mask)
    screen.print(explanation.table() if long else explained(explanation))
    if json_file is not None:
        write_json_atomic(json_file, explanation.as_dict())


@app.command()
@takes(TUNE)
def tune(context: typer.Context, model: str, **given: Any) -> None:
    """Measure on this machine's GPU which code of the op is fastest, and let `auto` choose by it.

    It takes seconds of GPU time, and once the time to compile the kernels. The verdicts go into the
    user's cache folder.
    """
    import torch

    from ila.commands.tune import tune as run

    if not torch.cuda.is_available():
        _complain("PyTorch sees no GPU here, so nothing was measured", led_by="error: ")
        raise typer.Exit(1)
    screen.print(str(run(model, **given)), highlight=False)


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
    screen.print(_with_picture(f"Table and figure in {out}", f"Table in {out}"))


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


def _with_picture(drawn: str, alone: str) -> str:
    """Return a text on files, and say if the picture is not among them."""
    from ila.reports.figures import NOT_DRAWN, can_draw

    return drawn if can_draw() else f"{alone}; {NOT_DRAWN}"


def _leave_the_screen() -> None:
    """Let the main process alone print."""
    from ila.runs.processes import leave_the_screen_to_the_main_process

    screen.quiet = leave_the_screen_to_the_main_process()


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

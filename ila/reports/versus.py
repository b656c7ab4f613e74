"""Compare one run with a selection and PEFT on all layers: a table and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ila.reports.texts import gib_text, ratio_text

if TYPE_CHECKING:
    from rich.table import Table

TIE = 0.02  # share of the gain within which two results count as equal
_HEADER = ("", "Training time, s", "Held-out loss", "Peak memory, GiB", "Trained parameters")


@dataclass(frozen=True)
class Contestant:
    """Cost and result of one run.

    Attributes:
        seconds: All of it: steps, scores, choice, cache.
        before: Held-out loss before training, in nats.
        after: The same after it.
        peak_bytes: Peak memory; None where it is unknown.
        parameters: Parameters that train at the end.
    """

    seconds: float
    before: float
    after: float
    peak_bytes: int | None
    parameters: int

    @classmethod
    def of_peft(cls, metrics: Mapping[str, Any]) -> Contestant:
        """Read the measurements of ``examples/train_with_peft.py``."""
        return cls(
            metrics["seconds"],
            metrics["held_out_loss_before"],
            metrics["held_out_loss"],
            metrics["peak_memory_bytes"],
            metrics["trainable_parameters"],
        )

    @classmethod
    def of_run(cls, metrics: Mapping[str, Any]) -> Contestant:
        """Read the metrics of ``ila train --select-at``."""
        selected, cache = metrics["selected"], metrics["prefix_cache"]
        search = selected["search"]
        seconds = search["seconds"] + search["choosing_seconds"] + selected["seconds"]
        return cls(
            seconds + (0.0 if cache is None else cache["seconds"]),
            metrics["held_out_loss_before"],
            metrics["held_out_loss"],
            metrics["peak_memory_bytes"],
            metrics["trainable_parameters"],
        )

    @classmethod
    def mean(cls, runs: Sequence[Contestant]) -> Contestant:
        """Return the mean of runs with several seeds, with the highest peak."""
        peaks = [run.peak_bytes for run in runs]
        return cls(
            fmean(run.seconds for run in runs),
            fmean(run.before for run in runs),
            fmean(run.after for run in runs),
            None if None in peaks else max(peaks),
            runs[0].parameters,
        )


@dataclass(frozen=True)
class Versus:
    """Means of both, over ``rounds`` seeds each."""

    peft: Contestant
    ours: Contestant
    rounds: int

    def _cells(self) -> list[tuple[str, ...]]:
        rows = (("PEFT, all layers", self.peft), ("one run with a selection", self.ours))
        return [
            (
                name,
                f"{run.seconds:.1f}{ratio_text(run.seconds, self.peft.seconds)}",
                f"{run.before:.3f} → {run.after:.3f}",
                gib_text(run.peak_bytes) + ratio_text(run.peak_bytes, self.peft.peak_bytes),
                f"{run.parameters:,}{ratio_text(run.parameters, self.peft.parameters)}",
            )
            for name, run in rows
        ]

    def table(self) -> Table:
        """Return the table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        rounds = f"mean of {self.rounds} seeds" if self.rounds > 1 else "one seed"
        table = Table(title=f"Same rows, steps and learning rate; {rounds}, search included")
        for index, name in enumerate(_HEADER):
            table.add_column(Text(name), justify="right" if index else "left")
        for row in self._cells():
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """Return the table and the verdict as Markdown."""
        lines = [_HEADER, ("---", *["---:"] * (len(_HEADER) - 1)), *self._cells()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.verdict()}\n"

    def verdict(self) -> str:
        """Name the faster run and the better result; within ``TIE`` of PEFT's gain, a tie."""
        gain = self.peft.before - self.peft.after
        lost = (self.ours.after - self.peft.after) / gain if gain > 0 else 0.0
        time = self.ours.seconds / self.peft.seconds
        faster = f"{1 - time:.0%} less time" if time < 1 else f"{time - 1:.0%} more time"
        if abs(lost) <= TIE:
            result = f"an equal result (within {TIE:.0%} of what PEFT gains)"
        else:
            word = "worse" if lost > 0 else "better"
            result = f"a {word} result, by {abs(lost):.1%} of what PEFT gains"
        return f"The run with a selection took {faster} than PEFT, for {result}."


def versus(peft: Sequence[Contestant], ours: Sequence[Contestant]) -> Versus:
    """Compare the means of both.

    Raises:
        ValueError: Not as many runs of one as of the other, or none.
    """
    if len(peft) != len(ours) or not ours:
        raise ValueError(f"both need as many runs, got {len(peft)} and {len(ours)}")
    return Versus(Contestant.mean(peft), Contestant.mean(ours), len(ours))

"""Turn the options of ``ila learn`` and ``ila train`` into their inputs and configurations."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import typer

from ila.commands import train, train_once
from ila.commands.adapter_kinds import ADALORA, AdapterKind
from ila.commands.hub import Hub, take_hub
from ila.commands.inputs import Inputs
from ila.commands.option_tables import CHOICE, INPUTS, SEARCH, Given
from ila.commands.resolved import resolved
from ila.commands.trainer_fields import trainer_fields
from ila.masks.mask import LayerMask
from ila.masks.objective import LAYERS
from ila.models.base_starts import takes_base
from ila.price.choice import Choice
from ila.runs.metrics import Metrics
from ila.search.config import SearchConfig
from ila.search.selection import Selection
from ila.training.config import TrainConfig
from ila.training.rates import usual_rate

# The sources of a value that the user gave, on the command line or in a file.
_GIVEN = ("COMMANDLINE", "DEFAULT_MAP")
# Fields of both configurations, under the names of their options.
_SHARED = ("batch_size", "eval_every", "packing", "loraplus_lr_ratio")
_KIND = tuple(field.name for field in fields(AdapterKind))


class SearchSettings(NamedTuple):
    """Settings of ``ila learn``, and the text of its ``config.yaml``."""

    config: SearchConfig
    inputs: Inputs
    written: dict[str, object]


def search_settings(context: typer.Context, given: Given) -> SearchSettings:
    """Make the settings of ``ila learn`` from its options."""
    usual = _usual_rate(context, given["full"])
    if takes_base(given["init_lora_weights"]):
        raise ValueError(
            f"--init-lora-weights {given['init_lora_weights']} moves a part of W into the adapter, "
            "and a search scores updates that begin at zero: learn the mask without, and give the "
            "option to ila train"
        )
    inputs = _inputs(given)
    fields = trainer_fields(given, context.obj, "stage1_steps and stage2_steps")
    rate = usual if given["learning_rate"] is None else given["learning_rate"]
    config = SearchConfig(
        **{name: given[name] for name in (*SEARCH, *_SHARED)},
        learning_rate=rate,
        save_every=given["save_every"] or None,
        training_args=fields,
    )
    _check_held_out(given)
    return SearchSettings(config, inputs, _written(given, inputs, fields, rate))


@dataclass(frozen=True)
class TrainSettings:
    """Settings of ``ila train``.

    Attributes:
        config: Options of the training.
        inputs: Options of the input.
        selection: Time and way of a selection in the middle of the run.
        written: Text of ``config.yaml``.
        note: Remark for the screen.
        given: Options of the command, by name.
        hub: Place to upload the adapter to.
    """

    config: TrainConfig
    inputs: Inputs
    selection: Selection | None
    written: dict[str, object]
    note: str
    given: Given
    hub: Hub | None = None

    def run(self) -> tuple[Metrics, str]:
        """Train, and upload where that is asked for; return the metrics and a note."""
        hub = None if self.hub is None else self.hub.make()
        metrics, note = self._train()
        if hub is not None:
            note = f"{note}\n{hub.upload(self.given['out'], self.given['mask'])}"
        return metrics, note

    def _train(self) -> tuple[Metrics, str]:
        given = self.given
        common = {"resume": given["resume"], "written": self.written}
        if self.selection is not None:
            return train_once.train_once(
                self.inputs, self.config, self.selection, given["out"], **common
            )
        return train.train_selected(
            self.inputs,
            self.config,
            given["out"],
            mask_file=given["mask"],
            closed=given["closed"] or ("drop" if given["start"] is None else "keep"),
            start=given["start"],
            full=given["full"],
            **common,
        )


def train_settings(context: typer.Context, given: Given) -> TrainSettings:
    """Make the settings of ``ila train`` from its options."""
    given = {**given, **_length(context, given)}
    selection = _selection(given)
    usual = _usual_rate(context, given["full"])
    _check_layers(given, selection)
    note = ""
    adapters = given["mask"] is not None and not given["full"] and given["start"] is None
    if given["learning_rate"] is None and adapters:
        usual, note = _rate_for(given["mask"])
    inputs = _inputs(given)
    folder = given["cache_folder"]
    if folder is not None and not given["cache_prefix"]:
        raise ValueError("--cache-folder says where --cache-prefix keeps its file; give both")
    read = trainer_fields(given, context.obj, "steps or epochs")
    fields, hub = take_hub(read, given["out"])
    if hub is not None and given["full"]:
        raise ValueError("push_to_hub uploads an adapter, and --full trains none")
    rate = usual if given["learning_rate"] is None else given["learning_rate"]
    names = ("steps", "epochs", "cache_limit_gib", *_SHARED)
    config = TrainConfig(
        **{name: given[name] for name in names},
        learning_rate=rate,
        save_every=given["save_every"] or None,
        cache_prefix=given["cache_prefix"] if folder is None else str(folder),
        training_args=fields,
    )
    _check_held_out(given)
    written = _written({**given, "steps": config.steps}, inputs, read, rate)
    return TrainSettings(config, inputs, selection, written, note, given, hub)


def _inputs(given: Given) -> Inputs:
    return Inputs(**{name: given[name] for name in INPUTS})


def _written(
    given: Given, inputs: Inputs, fields: dict[str, object], rate: float
) -> dict[str, object]:
    return resolved({**given, **asdict(inputs.located()), "learning_rate": rate}, fields)


def _length(context: typer.Context, given: Given) -> dict[str, None]:
    """Decide between --steps and --epochs: the command line wins over the file."""
    sources = {name: _source(context, name) for name in ("steps", "epochs")}
    asked = [name for name in sources if given[name] is not None]
    if len(asked) == 2 and len(set(sources.values())) == 1:
        raise ValueError("give one of --steps and --epochs, got both")
    if len(asked) < 2:
        return {}
    return {name: None for name, source in sources.items() if source == "DEFAULT_MAP"}


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def _usual_rate(context: typer.Context, full: bool) -> float:
    """Return the default learning rate; raise if --full meets an option of adapters."""
    if full:
        for name in ("rank", "alpha", "dropout", "load_in", "loraplus_lr_ratio", *_KIND):
            if _source(context, name) in _GIVEN:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} does nothing here: --full trains no adapter")
    return usual_rate(full=full)


def _rate_for(mask: Path) -> tuple[float, str]:
    """Return the learning rate for the layers that a mask opens, and a note on an unusual one."""
    opened = LayerMask.load(mask)
    rate = usual_rate(len(opened.open) / len(opened))
    if rate == usual_rate():
        return rate, ""
    return rate, (
        f"Learning rate {rate:.3g}: with {len(opened.open)} of {len(opened)} layers open they "
        f"want {rate / usual_rate():.2g} times the usual one; --learning-rate sets another"
    )


def _selection(given: Given) -> Selection | None:
    """Return the selection that the options describe; None without --select-at."""
    choice, at = {name: given[name] for name in CHOICE}, given["select_at"]
    if at is None:
        asked = [name for name, value in choice.items() if value is not None]
        asked += ["objective"] if given["objective"] != LAYERS else []
        if asked:
            raise ValueError(f"--{asked[0]} selects in the middle of a run; give --select-at too")
        return None
    if given["adapter"] == ADALORA:
        raise ValueError("--select-at needs --adapter lora; ila learn and --mask take adalora too")
    if takes_base(given["init_lora_weights"]):
        raise ValueError(
            f"--select-at scores updates that begin at zero; --init-lora-weights "
            f"{given['init_lora_weights']} goes with --mask, or with all layers"
        )
    if given["mask"] is not None or given["full"]:
        other = "--full" if given["full"] else "--mask"
        raise ValueError(f"--select-at selects layers of an adapter itself; leave out {other}")
    when = int(at) if at >= 1 and at == int(at) else at
    return Selection(
        Choice(**choice, objective=given["objective"]),
        when,
        given["closed"] or "keep",
        given["score"],
    )


def _check_layers(given: Given, selection: Selection | None) -> None:
    if given["start"] is not None and (given["full"] or selection is not None):
        raise ValueError("--from goes on from an adapter with --mask; it does nothing here")
    if given["start"] is not None and given["adapter"] == ADALORA:
        raise ValueError("--from needs --adapter lora: the ranks of AdaLoRA begin anew")
    if given["start"] is not None and given["init_lora_weights"] is not None:
        raise ValueError("--from goes on with the weights of an adapter; no --init-lora-weights")
    unclosed = selection is None and (given["mask"] is None or given["full"])
    if given["closed"] is not None and unclosed:
        raise ValueError("--closed says how layers close; give --mask or --select-at")


def _check_held_out(given: Given) -> None:
    if given["eval_every"] is not None and not given["held_out"]:
        raise ValueError("--eval-every measures the loss on held-out rows; --held-out is 0")

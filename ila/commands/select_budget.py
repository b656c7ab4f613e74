"""``ila select --budget``: cut a mask to the best layers for a budget, with a picture.

The command loads no weights. The sizes of the model come from its configuration. The sizes of a
step come from the run that learned the mask, or from the file of speeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ila.boundary import reading
from ila.masks.mask import LayerMask
from ila.masks.objective import LAYERS, worth
from ila.masks.provenance import Provenance
from ila.models.loading import LOAD_IN, find_source, same_layers
from ila.models.sizes import load_config
from ila.price.budget import ADDITIVE, MEMORY, TIME, Budget, Spending
from ila.price.knapsack import Point
from ila.price.shapes import Shape, check_counted
from ila.price.speed import Speed
from ila.reports.figures import NOT_DRAWN, can_draw
from ila.reports.pareto import pareto
from ila.runs.records import NUMBER, SIZE, TEXT, Field, check_record, or_null

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class StepSizes:
    """Model and size of a step; None takes the value of the mask."""

    model: str | None = None
    rows: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Selected:
    """Result of ``select_within``: the cut mask, its files, and the plain top-k beside it."""

    mask: LayerMask
    path: Path
    picture: Path | None
    spending: Spending
    point: Point
    plain: Point | None

    def text(self) -> str:
        """Describe the selection and the plain top-k beside it, in sentences."""
        budget, chosen = self.spending.budget, self.spending.described(self.point)
        lines = [
            f"{chosen['layers']} of {len(self.mask)} layers open, with "
            f"{chosen['importance_share']:.1%} of the importance, for "
            f"{budget.text(self.point.cost / self.spending.unit)}: {self.path}"
        ]
        if self.plain is None:
            cheapest = min(p.cost for p in self.spending.plain) / self.spending.unit
            lines.append(f"Plain top-k: no k fits; the best layer alone takes {cheapest:.3g}")
        else:
            beside = self.spending.described(self.plain)
            lines.append(
                f"Plain top-k within the same budget: {beside['layers']} layers, "
                f"{beside['importance_share']:.1%} of the importance, "
                f"{budget.text(self.plain.cost / self.spending.unit)}"
            )
        lines.append(self._how())
        method = Provenance(self.mask.provenance).method
        if method not in ADDITIVE:
            lines.append(
                f"The scores of method {method} are no shares of the loss, and their sum as "
                "importance is a convention: `ila learn --method path` measures shares"
            )
        return "\n".join([*lines, f"Importance against cost: {self.picture or NOT_DRAWN}"])

    def _how(self) -> str:
        shape, speed = self.spending.shape, self.spending.speed
        resource = self.spending.budget.resource
        step = f"a step of {shape.rows} rows of {shape.length} tokens"
        labelled = f"{step}, {shape.answers:.0%} of them labels"
        if resource == MEMORY:
            return (
                f"Counted for {step}: weights, adapters, gradients, AdamW and what autograd keeps, "
                "when backward begins and without checkpointing; buffers of kernels are on top"
            )
        if resource != TIME:
            return f"Counted at rank {shape.rank}"
        if isinstance(speed, Speed):
            return (
                f"Time of {labelled}, by the rates measured on {speed.measured['device']} (the "
                f"worst error of a step left out of the fit is {speed.worst_error:.1%})"
            )
        return (
            f"Time of {labelled}, counted at the ceilings of {speed}, not measured: see "
            "`ila measure`"
        )


def select_within(
    run: Path,
    budget: str,
    *,
    speed: str | None = None,
    step: StepSizes | None = None,
    out: Path | None = None,
    objective: str = LAYERS,
) -> Selected:
    """Open the most important layers of a learned mask that a budget pays for.

    Args:
        run: Folder of ``ila learn``, or a mask file.
        budget: ``"time=0.6"``, ``"memory=12GiB"`` or ``"parameters=1M"``.
        speed: File of ``measure`` or name of a GPU with known ceilings, for a budget of time.
        step: Model and size of a step; by default the values of the search.
        out: Mask file to write; by default ``mask-BUDGET.json`` beside the learned one. The
            picture goes beside it.
        objective: Worth of a set of layers: ``"layers"`` or ``"blocks"`` (``ila.masks.objective``).

    Raises:
        ValueError: If the budget cannot be read or pays for no layer, neither mask nor ``step``
            gives a size, or the file of speeds is of another model.
    """
    wanted, mask = Budget.parse(budget), LayerMask.load(run)
    _check_provenance(mask, run)
    if wanted.resource == TIME and speed is None:
        raise ValueError(
            "budget time needs --speed: a file that `ila measure` wrote, or a GPU's name such as "
            "'NVIDIA H100 80GB HBM3' to count with its ceilings"
        )
    if wanted.resource != TIME and speed is not None:
        raise ValueError(f"--speed does nothing for a budget of {wanted.resource}")
    rates = _rates(speed, mask)
    shape = _shape(mask, step or StepSizes(), rates, wanted.resource)
    spending = Spending(worth(mask, objective), wanted, shape, rates)
    point, plain = spending.chosen(), spending.plain_within()
    folder = run if run.is_dir() else run.parent
    out = folder / f"mask-{budget.replace('=', '-')}.json" if out is None else out
    gates = {name: name in point.opened for name in mask.scores}
    selection = _provenance(budget, spending, point, plain, speed)
    if objective != LAYERS:
        selection["objective"] = objective
    cut = LayerMask(mask.scores, gates, {**mask.provenance, "selection": selection})
    cut.save(out)
    drawn = out.with_suffix(".png")
    picture = pareto(spending, point, plain, drawn) if can_draw() else None
    return Selected(cut, out, picture, spending, point, plain)


def _provenance(
    budget: str, spending: Spending, point: Point, plain: Point | None, speed: str | None
) -> dict[str, object]:
    return {
        "top": None,
        "freeze": None,
        "budget": budget,
        "chosen": spending.described(point),
        "plain_top": None if plain is None else spending.described(plain),
        "speed": speed if not isinstance(spending.speed, Speed) else Path(speed).name,
        "step": {name: getattr(spending.shape, name) for name in ("rows", "length", "answers")},
    }


def _rates(speed: str | None, mask: LayerMask) -> Speed | str | None:
    """Read the rates in a file; return the name of a GPU unchanged."""
    if speed is None or not (speed.endswith(".json") or Path(speed).exists()):
        return speed
    rates = Speed.load(Path(speed))
    said, theirs = Provenance(mask.provenance), rates.measured.get("model")
    is_known = bool(said.model_record) and isinstance(theirs, Mapping)
    if is_known and not same_layers(said.model_record, theirs):
        raise ValueError(
            f"{speed} was measured on model {theirs['source']!r}, and the mask "
            f"was learned on {said.model_source!r}, whose layers have other names or sizes"
        )
    return rates


def _shape(mask: LayerMask, step: StepSizes, rates: Speed | str | None, resource: str) -> Shape:
    """Take sizes from the mask, overridden by ``step``; a file of speeds fixes the step."""
    said = Provenance(mask.provenance)
    rank = said.rank
    rows, length = step.rows or said.batch_size, step.length or said.max_length
    if isinstance(rates, Speed):
        given = {"rows": step.rows, "length": step.length, "rank": rank}
        rows, length, rank = _measured_sizes(rates, given)
    model = step.model or said.model
    _check_known({"model": model, "rank": rank, "rows": rows, "length": length})
    source = find_source(model, None if step.model else said.gguf_file)
    config = load_config(source.name, source.gguf_file, source.trust_remote_code)
    with reading(source.name, "model"):
        sizes = config.to_dict()
    check_counted(sizes, resource)
    return Shape.of(
        sizes,
        rank=rank,
        rows=rows,
        length=length,
        base_bytes=_bytes_of(said.dtype or str(config.dtype).removeprefix("torch.")),
        dropout=said.has_dropout,
        load_in=said.load_in,
        answers=said.answers or 1.0,
    )


def _measured_sizes(rates: Speed, given: Mapping[str, int | None]) -> tuple[int, int, int]:
    """Return rows, length and rank of the measured steps; raise if a given size differs."""
    for name, value in given.items():
        if value is not None and value != rates.measured[name]:
            raise ValueError(f"speed was measured with {name} {rates.measured[name]}, got {value}")
    return rates.measured["rows"], rates.measured["length"], rates.measured["rank"]


def _check_known(sizes: Mapping[str, str | int | None]) -> None:
    missing = [name for name, value in sizes.items() if value is None]
    if missing:
        raise ValueError(
            f"the mask does not say its {missing[0]}; a budget needs a mask that `ila learn` wrote"
            + (", or --model" if missing[0] == "model" else "")
        )


def _bytes_of(dtype: str) -> int:
    if dtype not in _BYTES:
        raise ValueError(
            f"the dtype of the model's weights must be one of {', '.join(_BYTES)}, got {dtype!r}: "
            "neither the mask nor the model's configuration says which"
        )
    return _BYTES[dtype]


# Fields of a mask's provenance that a budget reads; the user may give an absent one.
_INPUTS = {
    "model": or_null(TEXT),
    "gguf_file": or_null(TEXT),
    "rank": or_null(SIZE),
    "max_length": or_null(SIZE),
    "dropout": or_null(NUMBER),
    "load_in": Field(f"one of {LOAD_IN} or null", lambda value: value in (None, *LOAD_IN)),
}
_MODEL = dict.fromkeys(("source", "config_fingerprint", "dtype"), or_null(TEXT))
_CONFIG = {"batch_size": or_null(SIZE), "method": or_null(TEXT)}


def _check_provenance(mask: LayerMask, run: Path) -> None:
    """Raise unless the fields that a budget reads have the types that a search writes."""
    said = Provenance(mask.provenance)
    for fields, place, record in (
        (_INPUTS, "inputs", said.inputs),
        (_MODEL, "model", said.model_record),
        (_CONFIG, "search.config", said.config),
    ):
        values = {name: record.get(name) for name in fields}
        check_record(values, fields, f"mask {run}, {place} of its provenance")

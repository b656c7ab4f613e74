"""``ila select --budget`` and ``ila measure``: a mask cut to what a budget buys, with a picture.

No weights are loaded to select: the sizes come from the model's configuration, those of the step
from the run that learned the mask or from the file of speeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ila.boundary import reading
from ila.masks.mask import LayerMask
from ila.models.loading import LOAD_IN, find_source, same_layers
from ila.models.sizes import load_config
from ila.price.budget import ADDITIVE, MEMORY, TIME, Budget, Spending, method_of
from ila.price.knapsack import Point
from ila.price.shapes import Shape, check_counted
from ila.price.speed import Speed
from ila.reports.pareto import pareto
from ila.runs.records import NUMBER, SIZE, TEXT, Field, check_record, or_null

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class StepSizes:
    """What a step looks like where the mask does not say it: None takes what the mask says."""

    model: str | None = None
    rows: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Selected:
    """What ``select_within`` did."""

    mask: LayerMask
    path: Path
    picture: Path
    spending: Spending
    point: Point
    plain: Point | None

    def text(self) -> str:
        """The selection and the plain top-k beside it, in sentences."""
        budget, found = self.spending.budget, self.spending.described(self.point)
        lines = [
            f"{found['layers']} of {len(self.mask)} layers open, with "
            f"{found['importance_share']:.1%} of the importance, for "
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
        method = method_of(self.mask)
        if method not in ADDITIVE:
            lines.append(
                f"The scores of method {method} are no shares of the loss, and their sum as "
                "importance is a convention: `ila learn --method path` measures shares"
            )
        return "\n".join([*lines, f"Importance against cost: {self.picture}"])

    def _how(self) -> str:
        shape, speed, kind = self.spending.shape, self.spending.speed, self.spending.budget.kind
        step = f"a step of {shape.rows} rows of {shape.length} tokens"
        if kind == MEMORY:
            return (
                f"Counted for {step}: weights, adapters, gradients, AdamW and what autograd keeps, "
                "when backward begins and without checkpointing; buffers of kernels are on top"
            )
        if kind != TIME:
            return f"Counted at rank {shape.rank}"
        if isinstance(speed, Speed):
            return (
                f"Time of {step}, by the rates measured on {speed.measured['device']} (the worst "
                f"error of a step left out of the fit is {speed.worst_error:.1%})"
            )
        return f"Time of {step} counted at the ceilings of {speed}, not measured: see `ila measure`"


def select_within(
    run: Path,
    budget: str,
    *,
    speed: str | None = None,
    step: StepSizes | None = None,
    out: Path | None = None,
) -> Selected:
    """Open the most important layers of a learned mask that a budget pays for.

    Args:
        run: Folder of ``ila learn``, or a mask file.
        budget: ``"time=0.6"``, ``"memory=12GiB"`` or ``"parameters=1M"``.
        speed: For time: a file of ``measure``, or the name of a GPU whose ceilings are known.
        step: Model and size of a step; those the mask was learned with by default.
        out: Mask file to write; ``mask-BUDGET.json`` beside the learned one by default. The
            picture goes beside it.

    Raises:
        ValueError: If the budget cannot be read or pays for no layer, the mask does not say what
            is needed and ``step`` neither, or the file of speeds is of another model.
    """
    wanted, mask = Budget.parse(budget), LayerMask.load(run)
    _check_provenance(mask, run)
    if wanted.kind == TIME and speed is None:
        raise ValueError(
            "budget time needs --speed: a file that `ila measure` wrote, or a GPU's name such as "
            "'NVIDIA H100 80GB HBM3' to count with its ceilings"
        )
    if wanted.kind != TIME and speed is not None:
        raise ValueError(f"--speed does nothing for a budget of {wanted.kind}")
    rates = _rates(speed, mask)
    shape = _shape(mask, step or StepSizes(), rates, wanted.kind)
    spending = Spending(mask, wanted, shape, rates)
    point, plain = spending.chosen(), spending.plain_within()
    folder = run if run.is_dir() else run.parent
    out = folder / f"mask-{budget.replace('=', '-')}.json" if out is None else out
    cut = LayerMask(
        mask.scores,
        {name: name in point.opened for name in mask.scores},
        {**mask.provenance, "selection": _provenance(budget, spending, point, plain, speed)},
    )
    cut.save(out)
    picture = pareto(spending, point, plain, out.with_suffix(".png"))
    return Selected(cut, out, picture, spending, point, plain)


def _provenance(
    budget: str, spending: Spending, point: Point, plain: Point | None, speed: str | None
) -> dict[str, Any]:
    return {
        "top": None,
        "freeze": None,
        "budget": budget,
        "chosen": spending.described(point),
        "plain_top": None if plain is None else spending.described(plain),
        "speed": speed if not isinstance(spending.speed, Speed) else Path(speed).name,
        "step": {"rows": spending.shape.rows, "length": spending.shape.length},
    }


def _rates(speed: str | None, mask: LayerMask) -> Speed | str | None:
    """The rates in a file, or the name of a GPU as it is."""
    if speed is None or not (speed.endswith(".json") or Path(speed).exists()):
        return speed
    rates = Speed.load(Path(speed))
    ours, theirs = _of(mask, "model"), rates.measured.get("model")
    both = isinstance(ours, Mapping) and isinstance(theirs, Mapping)
    if both and not same_layers(ours, theirs):
        raise ValueError(
            f"{speed} was measured on model {theirs['source']!r}, and the mask "
            f"was learned on {_of(mask, 'model', 'source')!r}, whose layers have other names or "
            "sizes"
        )
    return rates


def _shape(mask: LayerMask, step: StepSizes, rates: Speed | str | None, what: str) -> Shape:
    """Sizes from the mask's provenance, overridden by ``step``; a file of speeds fixes the step."""
    found = {
        "model": step.model or _of(mask, "inputs", "model"),
        "rank": _of(mask, "inputs", "rank"),
        "rows": step.rows or _of(mask, "search", "config", "batch_size"),
        "length": step.length or _of(mask, "inputs", "max_length"),
    }
    if isinstance(rates, Speed):
        measured = rates.measured
        for name, given in (("rows", step.rows), ("length", step.length), ("rank", found["rank"])):
            if given is not None and given != measured[name]:
                raise ValueError(f"speed was measured with {name} {measured[name]}, got {given}")
            found[name] = measured[name]
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(
            f"the mask does not say its {missing[0]}; a budget needs a mask that `ila learn` wrote"
            + (", or --model" if missing[0] == "model" else "")
        )
    file = _of(mask, "inputs", "gguf_file")
    source = find_source(found.pop("model"), None if step.model else file)
    config = load_config(source.name, source.gguf_file, source.trust_remote_code)
    check_counted(config.to_dict(), what)
    dtype = _of(mask, "model", "dtype") or str(config.dtype).removeprefix("torch.")
    if dtype not in _BYTES:
        raise ValueError(
            f"the dtype of the model's weights must be one of {', '.join(_BYTES)}, got {dtype!r}: "
            "neither the mask nor the model's configuration says which"
        )
    with reading(source.name, "model"):
        sizes = config.to_dict()
    return Shape.of(
        sizes,
        **found,
        base_bytes=_BYTES[dtype],
        dropout=bool(_of(mask, "inputs", "dropout")),
        load_in=_of(mask, "inputs", "load_in"),
    )


# What a budget takes from a mask's provenance; where a field is not there, the user may say it.
_INPUTS = {
    **{"model": or_null(TEXT), "gguf_file": or_null(TEXT), "rank": or_null(SIZE)},
    **{"max_length": or_null(SIZE), "dropout": or_null(NUMBER)},
    "load_in": Field(f"one of {LOAD_IN} or null", lambda value: value in (None, *LOAD_IN)),
}
_MODEL = dict.fromkeys(("source", "config_fingerprint", "dtype"), or_null(TEXT))
_CONFIG = {"batch_size": or_null(SIZE), "method": or_null(TEXT)}


def _check_provenance(mask: LayerMask, run: Path) -> None:
    """Refuse a mask whose provenance holds what no search writes."""
    places = ((_INPUTS, "inputs"), (_MODEL, "model"), (_CONFIG, "search", "config"))
    for fields, *keys in places:
        said = {name: _of(mask, *keys, name) for name in fields}
        check_record(said, fields, f"mask {run}, {'.'.join(keys)} of its provenance")


def _of(mask: LayerMask, *keys: str) -> Any:
    """What the provenance holds under these keys; None where it does not."""
    found: Any = mask.provenance
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found

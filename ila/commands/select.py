"""``ila select``: cut the mask of a search, or make one for a model; imports torch if it must."""

from __future__ import annotations

import re
from pathlib import Path

from ila.commands import select_share
from ila.commands.mask_formats import check_format, write_format
from ila.commands.option_tables import SELECT, Given
from ila.masks.mask import LayerMask
from ila.masks.mask_file import file_of

_COUNTED = ("speed", "model", "batch_size", "max_length")
_OF_A_MODEL = ("gguf_file", "load_in", "target_modules", "trust_remote_code")
# The ranking of a model's weights that a share cuts unless --layers names another.
_BY_WEIGHTS = "kappa"


def select(run: Path, given: Given) -> list[str]:
    """Write the mask that the options ask for, and the file of ``--format``; return the report.

    Raises:
        ValueError: If ``run`` holds neither a mask nor a model, or options do not go together.
    """
    check_format(given["format"])
    shares = [name for name in ("top", "freeze", "budget") if given[name] is not None]
    if given["budget"] is None:
        _refuse(given, _COUNTED, "does nothing without --budget")
    if given["layers"] is None and (_is_unmasked_model(run) or _is_hub_id(run, given)):
        given = {**given, "layers": _default_ranking(run, given)}
    if given["layers"] is not None:
        mask, path, lines = _of_model(run, given)
        return lines + _written(mask, path, given["format"])
    _refuse(given, _OF_A_MODEL, "is for a model")
    _check_mask_there(run)
    if given["budget"] is not None and len(shares) == 1:
        from ila.commands.select_budget import StepSizes, select_within

        step = StepSizes(given["model"], given["batch_size"], given["max_length"])
        more = {name: given[name] for name in ("speed", "out", "objective")}
        done = select_within(run, given["budget"], step=step, **more)
        return [done.text(), *_written(done.mask, done.path, given["format"])]
    if given["format"] is not None and not shares and given["out"] is None:
        mask, path = LayerMask.load(run), file_of(run)
        return [_counted(mask, path), *_written(mask, path, given["format"])]
    if given["budget"] is not None:
        raise ValueError("give exactly one of --top, --freeze and --budget")
    share = {name: given[name] for name in ("top", "freeze", "out", "objective")}
    mask, path = select_share.select(run, **share)
    return [_counted(mask, path), *_written(mask, path, given["format"])]


def _of_model(run: Path, given: Given) -> tuple[LayerMask, Path, list[str]]:
    if given["budget"] is not None:
        raise ValueError("--budget cuts a learned mask; give --top or --freeze for a model")
    if run.exists() and not _is_model(run):
        if run.is_file() or file_of(run).is_file():
            raise ValueError(
                f"--layers is for a model, and {run} is none; a mask is cut with --top"
            )
        raise ValueError(_neither(run))
    _refuse(given, ("objective",), "cuts a learned mask; it does nothing for a model")
    if given["out"] is None:
        raise ValueError("a mask of a model needs --out, the mask file to write")
    from ila.commands.inputs import Inputs
    from ila.commands.select_model import Share, select_of_model

    inputs = Inputs(str(run), "", **{name: given[name] for name in _OF_A_MODEL})
    share = Share(given["top"], given["freeze"])
    chosen = select_of_model(inputs, given["layers"], share, given["out"])
    return chosen.mask, given["out"], [_counted(chosen.mask, given["out"]), *chosen.notes]


def _default_ranking(model: Path, given: Given) -> str:
    """Return the ranking of a model that --top or --freeze cuts without --layers."""
    if given["budget"] is None and given["top"] is None and given["freeze"] is None:
        raise ValueError(
            f"{model} is a model; say which of its layers to train, with --layers, or how many, "
            "with --top or --freeze"
        )
    return _BY_WEIGHTS


def _is_unmasked_model(run: Path) -> bool:
    return _is_model(run) and not (run / "mask.json").is_file()


def _is_hub_id(run: Path, given: Given) -> bool:
    """Return whether only a model can be meant: nothing is there, and --out says where to write."""
    shared = given["top"] is not None or given["freeze"] is not None
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(run)) and run.suffix not in (".json", ".gguf")
    return bool(named) and not run.exists() and shared and given["out"] is not None


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "config.json").is_file() or any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def _check_mask_there(run: Path) -> None:
    if file_of(run).is_file() and not _is_model(run):
        return
    if run.is_dir() and not _is_model(run):
        raise ValueError(_neither(run))


def _neither(run: Path) -> str:
    return (
        f"{run} must hold mask.json, of `ila learn`, or a model (config.json or a .gguf file), and "
        "holds neither"
    )


def _refuse(given: Given, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if given[name] != SELECT[name][1]:
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def _counted(mask: LayerMask, path: Path) -> str:
    return f"{len(mask.open)} of {len(mask)} layers open: {path}"


def _written(mask: LayerMask, path: Path, name: str | None) -> list[str]:
    return [] if name is None else [f"Open layers for {name}: {write_format(mask, path, name)}"]

"""``ila export``: copy a trained adapter, or merge it into its model."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights
from transformers import PreTrainedModel

from ila.boundary import reading, writing
from ila.commands.inputs import read_run
from ila.models.loading import find_source, load_model, load_tokenizer
from ila.models.merge import check_same_tensors
from ila.models.merge import merge as merge_adapter
from ila.models.open_weights import CHANGED_FILE, load_changed
from ila.runs.atomic import write_folder_atomic, write_json_atomic
from ila.runs.folder import RUN_MARKER
from ila.runs.records import OBJECT, TEXT, Field, check_record, or_null
from ila.training.train import ADAPTER_FILES

_INPUTS = {
    "model": TEXT,
    "dtype": TEXT,
    "gguf_file": or_null(TEXT),
    "load_in": or_null(TEXT),
    "trust_remote_code": Field("true or false", lambda value: isinstance(value, bool)),
}


def export(run: Path, out: Path, *, merge: bool = False) -> str:
    """Write a trained adapter, or changed weights, elsewhere: alone or in their base model.

    An adapter trained over a packed base merges into the dense base: packing again would round
    it away.

    Returns:
        Name of the result, for the screen.

    Raises:
        FileNotFoundError: If ``run`` holds no finished adapter or changed weights.
        FileExistsError: If ``out`` exists.
        ValueError: If the weights are damaged.
    """
    description = read_run(run, "train")
    check_record(description, {"inputs": OBJECT, "model": OBJECT}, run / RUN_MARKER)
    full = bool(description.get("full", False))
    files = (CHANGED_FILE, "run.json") if full else ADAPTER_FILES
    missing = [name for name in files if not (run / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{run} has no {' and no '.join(missing)}: is it finished?")
    if out.exists():
        raise FileExistsError(f"{out} exists and was left alone; give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not full:
        _check_config(run)
    if not merge:
        with write_folder_atomic(out) as folder:
            for name in (*files, *(() if full else beside(run))):
                shutil.copyfile(run / name, folder / name)
        return "Changed weights" if full else "Adapter"
    inputs = description["inputs"]
    check_record(inputs, _INPUTS, f"{run / RUN_MARKER}, inputs")
    source = find_source(inputs["model"], inputs["gguf_file"], inputs["trust_remote_code"])
    with write_folder_atomic(out) as folder:
        model, tokenizer = load_model(source, inputs["dtype"]), load_tokenizer(source)
        if full:
            load_changed(model, run)
        else:
            model = _merged(model, run)
        with writing(out):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        note = {"base": description["model"], "merged": True}
        packed = inputs.get("load_in")
        if packed:
            note["trained_over"] = packed
        write_json_atomic(folder / "ila-export.json", note)
    if full:
        return "Model with the changed weights"
    return f"Merged model (dense; trained over {packed})" if packed else "Merged model"


def beside(run: Path) -> list[str]:
    """Name the card and the tokenizer beside an adapter: all files that describe no run."""
    own = {"run.json", "train.json", "selection.json", "mask.json", "metrics.json", "before.json"}
    own |= {"verdicts.json", "log.jsonl", *ADAPTER_FILES}
    suffixes = {".json", ".jinja", ".md", ".model", ".txt"}
    names = sorted(p.name for p in run.iterdir() if p.is_file() and p.suffix in suffixes)
    return [name for name in names if name not in own]


def _check_config(run: Path) -> None:
    """Refuse an adapter with an unreadable configuration: a copy of it would be useless."""
    with reading(run / "adapter_config.json", "adapter"):
        PeftConfig.from_pretrained(str(run))


def _merged(model: PreTrainedModel, run: Path) -> PreTrainedModel:
    """Merge the adapter of a run into its base model; an adapter that lacks a part is refused."""
    with reading(f"{run} is damaged", "the adapter in"):
        adapted = PeftModel.from_pretrained(model, str(run))
        tensors = load_peft_weights(str(run), device="cpu")
        check_same_tensors(tensors, get_peft_model_state_dict(adapted), run)
        return merge_adapter(adapted)

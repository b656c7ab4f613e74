"""``ila select MODEL``: a mask for a model without a search, by names or by weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ila.boundary import reading
from ila.commands.inputs import Inputs, attach_adapter, versions
from ila.commands.spectrum_file import is_scored, read_ratios, read_unfrozen
from ila.masks.mask import LayerMask
from ila.masks.names import parse_module_name
from ila.masks.rules import bare, chosen_by
from ila.models.edit import masked_layers
from ila.models.loading import Source, find_source, identity, load_model
from ila.models.sizes import load_config
from ila.models.tensors import record_of_tensors
from ila.runs.processes import processes
from ila.search.spectra import SPECTRA, by_weights

_CLOSED = 0.0  # score of a layer that a rule leaves out; below every place within a kind


@dataclass(frozen=True)
class Share:
    """How much of a ranking to keep: the best ``top`` or all but the worst ``freeze``."""

    top: float | None = None
    freeze: float | None = None

    def cut(self, mask: LayerMask) -> LayerMask:
        """Cut a mask by the one share that is given."""
        return mask.top(self.top) if self.top is not None else mask.without_bottom(self.freeze)


@dataclass(frozen=True)
class Chosen:
    """A mask with its scores and gates, and remarks for the screen."""

    mask: LayerMask
    notes: list[str]


def select_of_model(inputs: Inputs, layers: str, share: Share, out: Path) -> Chosen:
    """Write a mask for a model by a rule, a file of Spectrum, or the weights of the model.

    A rule or a file needs the configuration of the model alone, and no weights.

    Args:
        inputs: Model, packing and layers to adapt; the data is not read.
        layers: One of ``SPECTRA``, a file, or a rule of ``ila.masks.rules``.
        share: Share to keep where layers are ranked.
        out: Mask file.

    Raises:
        ValueError: If ``layers`` chooses nothing, or a share is missing or does nothing.
    """
    _check_share(layers, share)
    inputs = inputs.located()
    source = find_source(inputs.model, inputs.gguf_file, inputs.trust_remote_code)
    weighed = layers in SPECTRA
    if weighed:
        model = load_model(source, inputs.dtype, inputs.load_in, processes().device)
    else:
        model = _outline(source)
    known = identity(model, source)
    found = masked_layers(attach_adapter(model, inputs), "default")
    if weighed:
        scored = LayerMask(by_weights(found, layers, progress=True))
        cut = share.cut(scored)
        chosen = Chosen(cut, [f"Ranked by {layers}, from the weights alone: {_kinds(cut)}"])
    else:
        chosen = _by_names(list(found), layers, share)
    selection = {"layers": layers, **asdict(share)}
    mask = chosen.mask.with_provenance(
        model=known,
        inputs={"model": inputs.model, "target_modules": inputs.target_modules},
        versions=versions(),
        search={"config": {"method": layers if weighed else "layers"}},
        selection=selection,
        **record_of_tensors(found),
    )
    mask.save(out)
    return Chosen(mask, [*chosen.notes, _depth(mask)])


def _check_share(layers: str, share: Share) -> None:
    given = [name for name, value in asdict(share).items() if value is not None]
    ranked = layers in SPECTRA or (Path(layers).is_file() and is_scored(Path(layers)))
    if ranked and len(given) != 1:
        raise ValueError(f"layers {layers} ranks layers; give exactly one of --top and --freeze")
    if not ranked and given:
        raise ValueError(f"--{given[0]} cuts a ranking, and --layers {layers} names its layers")


def _outline(source: Source) -> PreTrainedModel:
    """Make the model of a configuration without its weights."""
    config = load_config(source.name, source.gguf_file, source.trust_remote_code)
    options = {"trust_remote_code": source.trust_remote_code, "dtype": config.dtype}
    with reading(source.name, "model"), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, **options)
    return model


def _by_names(names: list[str], layers: str, share: Share) -> Chosen:
    file = Path(layers)
    if not file.is_file():
        return Chosen(_opening(names, chosen_by(layers, names)), [])
    if is_scored(file):
        ranked = read_ratios(file, names)
        cut = share.cut(LayerMask(ranked.places))
        scores = {name: ranked.places.get(name, _CLOSED) for name in names}
        gates = {name: name in ranked.places and cut.gates[name] for name in names}
        notes = _note(ranked.unscored, f"layers have no ratio in {file} and are closed")
        notes += _note(ranked.unmatched, f"names in {file} are no layers of a mask")
        return Chosen(LayerMask(scores, gates), notes)
    listed = read_unfrozen(file, names)
    notes = _note(listed.unmatched, f"patterns in {file} match no layer of a mask")
    return Chosen(_opening(names, listed.layers), notes)


def _opening(names: list[str], chosen: list[str]) -> LayerMask:
    kept = set(chosen)
    gates = {name: name in kept for name in names}
    return LayerMask({name: float(gate) for name, gate in gates.items()}, gates)


def _note(names: list[str], fault: str) -> list[str]:
    if not names:
        return []
    shown = ", ".join(map(bare, names[:4])) + (", …" if len(names) > 4 else "")
    return [f"{len(names)} {fault}: {shown}"]


def _kinds(mask: LayerMask) -> str:
    """Count the open layers of each kind, most first."""
    counts = Counter(name.rpartition(".")[2] for name in mask.open)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _depth(mask: LayerMask) -> str:
    """Say how far backward goes down."""
    blocks = [parsed[0] for name in mask.scores if (parsed := parse_module_name(name))]
    opened = [parsed[0] for name in mask.open if (parsed := parse_module_name(name))]
    if not opened:
        return "No open layer is in a numbered block"
    lowest, count = min(opened), max(blocks) + 1
    return f"Lowest open block: {lowest} of 0-{count - 1}; backward skips {lowest} of {count}"

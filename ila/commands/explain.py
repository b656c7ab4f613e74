"""``ila explain``: report the path and the memory of each layer."""

from __future__ import annotations

from pathlib import Path

from ila.commands.inputs import Inputs, attach_adapter
from ila.masks.mask import LayerMask
from ila.models.edit import apply_mask
from ila.models.explain import Explanation, explain
from ila.models.lean_head import leaning
from ila.models.loading import find_source, load_model
from ila.runs.processes import processes


def explain_layers(inputs: Inputs, tokens: int, *, mask_file: Path | None = None) -> Explanation:
    """Report which layers a mask opens, which path computes each, and the bytes that it keeps.

    The function reads model and adapter options of ``inputs``, and no data.
    """
    mask = None if mask_file is None else LayerMask.load(mask_file)
    source = find_source(inputs.model, inputs.gguf_file, inputs.trust_remote_code)
    model = load_model(source, inputs.dtype, inputs.load_in, processes().device)
    model = attach_adapter(model, inputs)
    if mask is not None:
        apply_mask(model, mask)
    with leaning(model):  # as training does
        return explain(model, tokens)

"""``ila measure``: time steps on this machine and write rates for budgets of time."""

from __future__ import annotations

from pathlib import Path

from ila.commands.inputs import Inputs, attach_adapter
from ila.models.loading import DTYPES, check_runs, find_source, identity, load_model
from ila.price.calibration import calibrate
from ila.price.shapes import Shape, check_counted
from ila.price.speed import Speed
from ila.runs.processes import processes


def measure(
    inputs: Inputs, out: Path, *, rows: int, rounds: int = 5, progress: bool = True
) -> Speed:
    """Time steps of a dozen masks on this machine and write the rates that fit them.

    Args:
        inputs: Model and adapter; a row has ``max_length`` tokens. The function reads no data.
        out: File to write.
        rows: Rows of a step.
        rounds: Steps of each mask, after one warm-up step.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If ``rows`` or ``rounds`` is below 1, or the model has no Llama blocks.
    """
    if inputs.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {inputs.dtype!r}")
    source = find_source(inputs.model, inputs.gguf_file, inputs.trust_remote_code)
    base = load_model(source, inputs.dtype, inputs.load_in, processes().device)
    check_runs(base, source, [{"input_ids": [0] * inputs.max_length}])
    check_counted(base.config.to_dict(), "time")
    shape = Shape.of(
        base.config.to_dict(),
        rank=inputs.rank,
        rows=rows,
        length=inputs.max_length,
        base_bytes=base.dtype.itemsize,
        dropout=inputs.dropout > 0,
        load_in=inputs.load_in,
    )
    model = identity(base, source)
    speed = calibrate(attach_adapter(base, inputs), shape, rounds=rounds, progress=progress)
    speed.measured["model"] = model
    speed.save(out)
    return speed

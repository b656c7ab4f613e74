"""What is not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLE = "Not measured"
ORDER = 100

NEVER = (
    "Any time on a GPU: of a layer, of a training step, of the search; and with it % of the "
    'roofline, and whether the Triton kernels beat library GEMMs anywhere. `impl="auto"` '
    "therefore takes library GEMMs everywhere, until `ila tune --model MODEL` is run on a GPU. "
    "`make gpu-day` measures all of this in nine minutes on a machine that has one.",
    "Peak memory on a GPU. The tables of memory are counts; what they leave out is said there.",
    "Unsloth, axolotl, LoRAFusion and other packages that need a GPU to run at all. Their method, "
    "library GEMMs with `addmm` in an autograd function, is a contestant in our own words where "
    "times are measured.",
    "Models larger than 135 million parameters, other than by counting.",
    "Several GPUs. Tests run DDP and FSDP2 on two CPU processes, for the numbers and not for time.",
)


def on_gpu(results: Mapping[str, Any]) -> list[str]:
    """Names of the results that come from a GPU."""
    names = []
    for name, result in results.items():
        where = result.get("environment", {}) if isinstance(result, Mapping) else {}
        if str(where.get("device", "cpu")).startswith("cuda"):
            names.append(name)
    return names


def markdown(results: Mapping[str, Any]) -> list[str]:
    if not results:
        return []
    names = on_gpu(results)
    said = (
        f"Measured on a GPU: {', '.join(f'`{name}`' for name in names)}. What is left of this list "
        "has to be read with them."
        if names
        else "No GPU was at hand. Columns for one say “not measured” where a reader would look for "
        "them."
    )
    return [
        said,
        "\n".join(f"- {item}" for item in NEVER),
    ]

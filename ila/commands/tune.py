"""``ila tune``: measure the kernels on this machine for the layers of a model."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import Progress

from ila.models.loading import DTYPES, find_source
from ila.models.sizes import load_config
from ila.price.shapes import Shape, check_counted
from ila_kernels import Tuned
from ila_kernels import tune as measure_kernels

GroupShape = tuple[int, tuple[int, ...]]


def tune(
    model: str,
    *,
    tokens: int = 8192,
    rank: int = 16,
    dtype: str = "bfloat16",
    dropout: float = 0.0,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Tuned:
    """Measure the op on this machine's GPU for the layer shapes of a model, and keep the verdicts.

    Args:
        model: Hub id, folder or GGUF file; the function reads its configuration only.
        tokens: Tokens of a step.
        rank: Rank of the adapter.
        dtype: Dtype of the base.
        dropout: Dropout of the adapter.
        gguf_file: Name of the GGUF file in the model's folder.
        trust_remote_code: Whether to run code that comes with the model.
        progress: Whether to show a progress bar on stderr.

    Raises:
        RuntimeError: PyTorch sees no GPU.
        ValueError: An option is out of range, or the model has no Llama blocks.
    """
    if dtype not in DTYPES or dtype == "auto":
        known = sorted(set(DTYPES) - {"auto"})
        raise ValueError(f"dtype must be one of {known}, got {dtype!r}")
    source = find_source(model, gguf_file, trust_remote_code)
    config = load_config(source.name, source.gguf_file, source.trust_remote_code).to_dict()
    check_counted(config, "time")
    shapes = shapes_of(Shape.of(config, rank=rank, rows=1, length=tokens))
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Measuring")

        def advance(done: int, count: int, cell: str) -> None:
            bar.update(task, completed=done, total=count, description=cell)

        return measure_kernels(
            shapes,
            rank=rank,
            rows=(tokens,),
            dtype=getattr(torch, dtype),
            dropout_p=dropout,
            progress=advance,
        )


def shapes_of(shape: Shape) -> list[GroupShape]:
    """Return (K, (N, …)) of the four steps of a block, and of gate or up with the other closed.

    The layers of a step read one x.

    >>> shapes_of(Shape(1, 64, 128, 4, 2, 16, 100, False, rank=8, rows=1, length=8))
    [(64, (64, 32, 32)), (64, (64,)), (64, (128, 128)), (64, (128,)), (128, (64,))]
    """
    heads, keys = shape.attention, shape.kv_heads * shape.head_dim
    return [
        (shape.hidden, (heads, keys, keys)),
        (heads, (shape.hidden,)),
        (shape.hidden, (shape.mlp, shape.mlp)),
        (shape.hidden, (shape.mlp,)),
        (shape.mlp, (shape.hidden,)),
    ]

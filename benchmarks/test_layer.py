"""Time of one layer, forward and backward: shapes of known models, ranks, tokens, gates, dropout.

    pytest benchmarks/test_layer.py [--full]

Everything in bf16 with fp32 adapters, PEFT's default, unless a contestant says otherwise. TFLOP/s
and GB/s follow each contestant's own formula of ``ila_kernels.roofline``; the share of the roofline
is the least time that the mathematics needs over the time taken, the same least for everybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from benchmarks.harness.session import Options
from benchmarks.layer.cell import LayerCell
from benchmarks.layer.shapes import GROUPS, LAYERS, WIDTHS

RESULT = "layer"
SMOL = "SmolLM2-135M"
RANKS = (8, 16, 32, 64, 128, 256)
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)


def cells(options: Options) -> Iterator[LayerCell]:
    """What is measured at each size."""
    packed = find_spec("bitsandbytes") is not None

    def cell(model: str, layers: str, m: int, r: int = 16, **more) -> LayerCell:
        return LayerCell(options, model, layers, m, r, **more)

    if options.size == "smoke":
        yield cell(SMOL, "q", 16, 8)
        yield cell(SMOL, "gate up", 80, 8)
        yield cell(SMOL, "q", 80, 8, gate="soft")
        yield cell(SMOL, "q", 80, 8, dropout=True)
        return
    full = options.size == "full"
    if full:
        tokens = 8192 if options.device.type == "cuda" else 512
        for model in WIDTHS:
            yield from (cell(model, layer, tokens, compiled=True) for layer in LAYERS)
            yield from (cell(model, group, tokens) for group in GROUPS)
    else:
        tokens = 512
        yield cell("Llama-2-7B", "gate", 128)
        yield cell("Llama-3-8B", "q", 256)
        yield cell("Llama-3-8B", "q k v", 128)
        yield cell("Mistral-7B", "down", 128)
        yield cell(SMOL, "q", tokens)
        yield cell(SMOL, "gate", tokens, compiled=True)
        yield from (cell(SMOL, group, tokens) for group in GROUPS)
    model = "Llama-3-8B" if full and options.device.type == "cuda" else SMOL
    base = [(tokens, 16)]
    sweep = [(m, 16) for m in (TOKENS if full else (1, 16, 64, 2048))]
    sweep += [(tokens, r) for r in (RANKS if full else (8, 64, 256))]
    yield from (cell(model, "up", m, r) for m, r in sweep if (m, r) not in base)
    yield from (cell(model, "gate", tokens, gate=g) for g in ("open", "zero", "soft", "closed"))
    yield cell(model, "gate", tokens, dropout=True)
    if packed:
        yield cell(model, "gate", tokens, packed=True)


@pytest.mark.gate
def test_gate(cell, session):
    session.gate(cell)


def test_layer(cell, contestant, show):
    show(RESULT, cell, contestant)

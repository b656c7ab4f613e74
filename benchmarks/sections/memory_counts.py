"""Rows of ``memory.json``: which are shown, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sections.common import placed

CARDS_GB = (16, 24, 40, 80)
TOKENS = 4096  # of the tables and figures of one length
NAMES = {"llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B", "mistral-7b": "Mistral-7B"}
BASES = {"bf16": "LoRA over bf16", "nf4": "QLoRA over NF4"}
RESTRICTED, OURS = "PEFT, the same layers", "ours"
PEFT_BF16 = "PEFT, adapters in the base's dtype"
RESTRICTED_BF16 = "PEFT, the same layers, adapters in the base's dtype"
RESTRICTED_FUSED = "PEFT, the same layers, fused loss"
# Contestant, share, position: the rows of the tables, in this order; others are in the file.
_RIVALS = (RESTRICTED, RESTRICTED_BF16, RESTRICTED_FUSED, OURS)
ROWS = (
    ("PEFT", 1.0, "all"),
    (PEFT_BF16, 1.0, "all"),
    ("PEFT, prepared for k-bit training", 1.0, "all"),
    ("PEFT, fused loss", 1.0, "all"),
    (OURS, 1.0, "all"),
    *((OURS, 0.75, position) for position in ("scattered", "top", "bottom")),
    *((who, 0.3, "scattered") for who in _RIVALS),
    *((who, 0.3, "top") for who in _RIVALS),
    *((who, 0.3, "bottom") for who in (RESTRICTED, OURS)),
    *((who, 0.1, "scattered") for who in _RIVALS),
    *((who, 0.1, "top") for who in _RIVALS),
)
GB = 1e9


def chosen(results: Mapping[str, Any], model: str, base: str, checkpointing: bool) -> dict:
    """(contestant, share, position) -> its row; of scatterings, the one with seed 0."""
    return {
        (r["contestant"], r["share"], r["position"]): r
        for r in results["rows"]
        if (r["model"], r["base"], r["checkpointing"]) == (model, base, checkpointing)
        and r["seed"] in (None, 0)
    }


def label(key: tuple[str, float, str]) -> str:
    """What a row is called in tables and figures."""
    who, share, position = key
    if position == "all":
        return {OURS: "ours, all layers", PEFT_BF16: "PEFT, bf16 adapters"}.get(who, who)
    layers = placed(f"{share * 100:.0f} % {position}")
    if who == OURS:
        return f"ours, {layers}"
    same = f"the same {layers}" if position == "scattered" else f"the {layers}"
    how = {RESTRICTED_BF16: ", bf16 adapters", RESTRICTED_FUSED: ", fused loss"}.get(who, "")
    return f"PEFT{how} on {same}"

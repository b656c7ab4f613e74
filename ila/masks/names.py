"""Names of modules and layers: the number of a block, the kinds of its layers, their order."""

from __future__ import annotations

import re

BLOCK_NUMBER = re.compile("0|[1-9][0-9]{0,8}")


def parse_module_name(name: str) -> tuple[int, str] | None:
    """Split a module name into its block number and its kind.

    Args:
        name: A name from ``model.named_modules()``.

    Returns:
        The first dotted part that is a number, and the last part; None if no number comes before
        the last part.

    >>> parse_module_name("base_model.model.model.layers.12.self_attn.q_proj")
    (12, 'q_proj')
    >>> parse_module_name("lm_head") is None
    True
    """
    *parents, kind = name.split(".")
    for part in parents:
        if BLOCK_NUMBER.fullmatch(part):
            return int(part), kind
    return None


# PEFT's prefix of the names of the base's modules.
PEFT_PREFIX = "base_model.model."

# The linear layers of a block in the order of the data; the layers of one group read the same x.
QKV, OUTPUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)
KINDS = (*QKV, *OUTPUT, *GATE_UP, *DOWN)

"""Shapes of the linear layers of known models, by name."""

from __future__ import annotations

# hidden size, width of k and v, width of the MLP: from the models' published configurations.
WIDTHS = {
    "Llama-2-7B": (4096, 4096, 11008),
    "Llama-3-8B": (4096, 1024, 14336),
    "Mistral-7B": (4096, 1024, 14336),
    "Qwen3-8B": (4096, 1024, 12288),
    "SmolLM2-135M": (576, 192, 1536),
}
# What reads one x, in the order of a block.
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = ("q k v", "gate up")


def shape(model: str, layer: str) -> tuple[int, int]:
    """(K, N) of one layer of a model.

    >>> shape("Llama-3-8B", "k"), shape("SmolLM2-135M", "down")
    ((4096, 1024), (1536, 576))
    """
    hidden, kv, mlp = WIDTHS[model]
    sizes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden)}
    sizes |= {"gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden)}
    if layer not in sizes:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    return sizes[layer]

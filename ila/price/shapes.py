"""A model of Llama blocks and a training step on it, as numbers; no model is loaded for it.

Memory and time are counted for ``COUNTED`` alone, where the tests compare with what a step holds:
another family's norms, activations and attention keep more, Qwen3 a quarter and Gemma-3 two fifths
on a tiny model. The layers of ``SAME_LAYERS`` have the sizes of Llama's, so parameters are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ila.masks.names import KINDS
from ila_kernels.roofline import Problem

_BITS = {"8bit": 8.0, "4bit": 4.127}  # NF4: with its constants, which are quantised again


COUNTED = ("llama", "mistral")
SAME_LAYERS = (
    *COUNTED,
    *("qwen2", "qwen3", "olmo", "olmo2", "gemma", "gemma2", "gemma3_text", "smollm3", "granite"),
    *("cohere", "ministral", "seed_oss"),
)


def check_counted(config: Mapping[str, Any], what: str) -> None:
    """Raise unless the formulas hold for a model.

    Args:
        config: Its configuration.
        what: ``"parameters"``, ``"memory"`` or ``"time"``.

    Raises:
        ValueError: If they do not; the message names what they hold for.
    """
    known = SAME_LAYERS if what == "parameters" else COUNTED
    kind, act = config.get("model_type"), config.get("hidden_act")
    if kind not in known:
        others = "" if kind not in SAME_LAYERS else "; parameters=… counts it"
        raise ValueError(
            f"{what} of a step is counted for the model types {', '.join(known)}, and this model "
            f"is {kind!r}, whose blocks keep something else{others}"
        )
    if what != "parameters" and act not in ("silu", "swish"):
        raise ValueError(
            f"{what} of a step is counted for hidden_act 'silu', and this model has {act!r}"
        )


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, of its adapter, and of a step: rows × length tokens, padding included.

    ``base_bytes`` is the width of activations and of dense weights; adapters are fp32. ``load_in``
    is ``"4bit"`` or ``"8bit"`` where the linear weights of the blocks are packed.
    """

    blocks: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    rank: int
    rows: int
    length: int
    base_bytes: int = 2
    dropout: bool = False
    load_in: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], **options: Any) -> Shape:
        """Read a model's configuration; ``options`` are the fields that are not the model's.

        Raises:
            ValueError: If the configuration is not of such a model, or an option is below 1.
        """
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        missing = [name for name in (*names, "vocab_size") if not config.get(name)]
        if missing:
            raise ValueError(
                f"a budget counts models of Llama blocks; the configuration has no {missing[0]}"
            )
        for name in ("rank", "rows", "length"):
            if options[name] < 1:
                raise ValueError(f"{name} must be ≥ 1, got {options[name]}")
        blocks, hidden, mlp, heads = (config[name] for name in names)
        return cls(
            blocks,
            hidden,
            mlp,
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["vocab_size"],
            bool(config.get("tie_word_embeddings")),
            **options,
        )

    @property
    def tokens(self) -> int:
        """M, the tokens of a step."""
        return self.rows * self.length

    @property
    def attention(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    def linear(self, kind: str) -> Problem:
        """The layer of this kind as the formulas of the kernels know it."""
        keys = self.kv_heads * self.head_dim
        into = {"o_proj": self.attention, "down_proj": self.mlp}
        out = {"q_proj": self.attention, "k_proj": keys, "v_proj": keys}
        out |= {"gate_proj": self.mlp, "up_proj": self.mlp}
        k, n = into.get(kind, self.hidden), out.get(kind, self.hidden)
        return Problem(self.tokens, k, n, self.rank, self.base_bytes, 4, self.dropout)

    def adapter_parameters(self, kind: str) -> int:
        """R·(K + N)."""
        linear = self.linear(kind)
        return self.rank * (linear.k + linear.n)

    def weight_bytes(self) -> int:
        """All frozen weights: embedding and head, norms, the linears of the blocks."""
        dense = self.vocabulary * self.hidden * (1 if self.tied else 2)
        dense += (2 * self.blocks + 1) * self.hidden
        linears = [self.linear(kind) for kind in KINDS]
        weights = self.blocks * sum(p.k * p.n for p in linears)
        bits = 8 * self.base_bytes if self.load_in is None else _BITS[self.load_in]
        return dense * self.base_bytes + round(weights * bits / 8)

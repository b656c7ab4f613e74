"""Sizes of a model of Llama blocks and of a training step on it; reads no weights.

Memory and time are counted for the families of ``COUNTED`` alone, which the tests compare with a
real step, byte for byte. Norms and activations of other families keep more: on a tiny model in bf16
the count would be 15 % too low for Qwen3, 17 % for OLMo-2 and 25 % for Gemma-3. Parameters are
counted for ``SAME_LAYERS`` too, whose layers have the sizes of Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ila.masks.names import KINDS
from ila_kernels.roofline import Problem

_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
_BITS = {"8bit": 8.0, "4bit": 4.127}  # NF4: with its constants, which are quantised again


COUNTED = ("llama", "mistral", "qwen2", "smollm3", "granite", "ministral")
SAME_LAYERS = (
    *COUNTED,
    *"qwen3 olmo olmo2 gemma gemma2 gemma3_text cohere seed_oss".split(),
)


def check_counted(config: Mapping[str, Any], resource: str) -> None:
    """Raise unless the formulas hold for a model.

    Args:
        config: Configuration of the model.
        resource: ``"parameters"``, ``"memory"`` or ``"time"``.

    Raises:
        ValueError: If they do not; the message names the counted families.
    """
    known = SAME_LAYERS if resource == "parameters" else COUNTED
    kind, act = config.get("model_type"), config.get("hidden_act")
    if kind not in known:
        others = "" if kind not in SAME_LAYERS else "; parameters=… counts it"
        raise ValueError(
            f"{resource} of a step is counted for the model types {', '.join(known)}, and this "
            f"model is {kind!r}, whose blocks keep something else{others}"
        )
    if resource != "parameters" and act not in ("silu", "swish"):
        raise ValueError(
            f"{resource} of a step is counted for hidden_act 'silu', and this model has {act!r}"
        )


def _check_sizes(config: Mapping[str, Any], answers: float, **counts: int) -> None:
    missing = [name for name in _NEEDED if not config.get(name)]
    if missing:
        raise ValueError(
            f"a budget counts models of Llama blocks; the configuration has no {missing[0]}"
        )
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be ≥ 1, got {value}")
    if not 0 < answers <= 1:
        raise ValueError(f"answers must be in (0, 1], a share of the tokens, got {answers}")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, of its adapter, and of a step of rows × length tokens, with padding.

    ``base_bytes`` is the width of activations and of dense weights; adapters are fp32. ``load_in``
    is ``"4bit"`` or ``"8bit"`` if the linear weights of the blocks are packed. ``answers`` is the
    share of the tokens that are labels: a lean head computes logits of those alone. ``biases`` is
    the number of elements of a block's biases.
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
    answers: float = 1.0
    biases: int = 0

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        *,
        rank: int,
        rows: int,
        length: int,
        base_bytes: int = 2,
        dropout: bool = False,
        load_in: str | None = None,
        answers: float = 1.0,
    ) -> Shape:
        """Read the sizes of a model from its configuration; the options are the other fields.

        Raises:
            ValueError: If the model has no Llama blocks, or an option is out of its range.
        """
        _check_sizes(config, answers, rank=rank, rows=rows, length=length)
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads, head_dim = _kv_heads(config), config.get("head_dim") or hidden // heads
        return cls(
            blocks=config["num_hidden_layers"],
            hidden=hidden,
            mlp=config["intermediate_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            rank=rank,
            rows=rows,
            length=length,
            base_bytes=base_bytes,
            dropout=dropout,
            load_in=load_in,
            answers=answers,
            biases=_biases(config, (heads + 2 * kv_heads) * head_dim),
        )

    @property
    def tokens(self) -> int:
        """Return M, the tokens of a step."""
        return self.rows * self.length

    @property
    def labels(self) -> int:
        """Return the tokens that the head computes logits of; one at least."""
        return max(1, round(self.tokens * self.answers))

    @property
    def attention(self) -> int:
        """Return the width of all heads together."""
        return self.heads * self.head_dim

    def linear(self, kind: str) -> Problem:
        """Return the problem of a layer of this kind, for the formulas of the kernels."""
        keys = self.kv_heads * self.head_dim
        into = {"o_proj": self.attention, "down_proj": self.mlp}
        out = {"q_proj": self.attention, "k_proj": keys, "v_proj": keys}
        out |= {"gate_proj": self.mlp, "up_proj": self.mlp}
        k, n = into.get(kind, self.hidden), out.get(kind, self.hidden)
        return Problem(self.tokens, k, n, self.rank, self.base_bytes, 4, self.dropout)

    def adapter_parameters(self, kind: str) -> int:
        """Return R·(K + N)."""
        linear = self.linear(kind)
        return self.rank * (linear.k + linear.n)

    def weight_bytes(self) -> int:
        """Count the bytes of all frozen weights: embedding, head, norms, linears of the blocks."""
        dense = self.vocabulary * self.hidden * (1 if self.tied else 2)
        dense += (2 * self.blocks + 1) * self.hidden + self.blocks * self.biases
        linears = [self.linear(kind) for kind in KINDS]
        weights = self.blocks * sum(p.k * p.n for p in linears)
        bits = 8 * self.base_bytes if self.load_in is None else _BITS[self.load_in]
        return dense * self.base_bytes + round(weights * bits / 8)


def _kv_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _biases(config: Mapping[str, Any], qkv: int) -> int:
    """Count the biases of a block; Qwen2 has some on q, k and v, and no option says so."""
    if config.get("model_type") == "qwen2":
        return qkv
    attention = qkv + config["hidden_size"] if config.get("attention_bias") else 0
    mlp = 2 * config["intermediate_size"] + config["hidden_size"] if config.get("mlp_bias") else 0
    return attention + mlp

"""Models of true width with a few blocks and random weights: a fresh machine has no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from benchmarks.harness.session import Options
from benchmarks.model.cell import ModelCell
from benchmarks.model.contestants import FUSED_LOSS, KERNELS, LIGER, Spec
from benchmarks.model.material import Material
from benchmarks.peers import liger

# From the models' published configurations.
CONFIGS: dict[str, PretrainedConfig] = {
    "Llama-3-8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "Qwen3-8B": Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rope_theta=1e6, tie_word_embeddings=False,
    ),
}  # fmt: skip
RANK = 16
# Blocks, rows and tokens of a row: the gate needs the model and a step of it in fp64.
LARGE, SMALL = (4, 4, 1024), (2, 2, 512)
LARGE_BYTES = 60e9


def specs(device: torch.device) -> list[Spec]:
    """Every contestant, on all layers and on those of the last half of the blocks."""
    peers = [Spec("PEFT"), Spec("PEFT, base dtype"), Spec(FUSED_LOSS)]
    peers += [Spec(LIGER)] if liger.is_available() else []
    kinds = tuple(KERNELS) if device.type == "cuda" else ("ours",)
    everywhere = [*peers, *(Spec(kind) for kind in kinds), Spec("frozen")]
    return everywhere + [Spec(kind, 0.5, "top") for kind in ("PEFT", *kinds)]


def cells(options: Options) -> list[ModelCell]:
    """One cell for each model, as large as the GPU's memory allows."""
    memory = torch.cuda.get_device_properties(options.device).total_memory
    size = LARGE if memory > LARGE_BYTES else SMALL
    return [cell(options, name, config, *size) for name, config in CONFIGS.items()]


def cell(
    options: Options, name: str, config: PretrainedConfig, blocks: int, rows: int, width: int
) -> ModelCell:
    """A training step of the first blocks of a model, on random tokens."""

    def model() -> nn.Module:
        return random_model(f"{name}, {blocks} of {config.num_hidden_layers} blocks", config,
                            blocks, options.device)  # fmt: skip

    contestants = specs(options.device)
    made = ModelCell(
        options,
        name,
        contestants,
        rows,
        width,
        options.rounds or 15,
        rank=RANK,
        model=model,
        strict=False,
    )
    made.material = Material(
        random_rows(made.batches * rows, width, config.vocab_size), rows, width, options.device
    )
    return made


def random_model(
    name: str, config: PretrainedConfig, blocks: int, device: torch.device
) -> nn.Module:
    """The first blocks with random weights in bf16, frozen."""
    changes = {"num_hidden_layers": blocks, "layer_types": ["full_attention"] * blocks}
    own = type(config).from_dict(config.to_dict() | changes)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16)
    model.config._name_or_path = str(Path(name))
    return model.requires_grad_(False)


def random_rows(count: int, width: int, words: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens; the second half of each is the answer."""
    generator = torch.Generator().manual_seed(0)
    ids: Sequence[list[int]] = torch.randint(words, (count, width), generator=generator).tolist()
    half = width // 2
    return [{"input_ids": row, "labels": [-100] * half + row[half:]} for row in ids]

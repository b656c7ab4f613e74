"""Who is counted by ``benchmarks.memory``: models at true size without data, and contestants.

NF4 is what bitsandbytes stores: two weights a byte, an 8-bit scale per 64 of them, an fp32 scale
per 256 of those scales, and in every layer two tables and an offset. The embedding, the norms and
the head stay in bf16, as transformers leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ila
from benchmarks.memory import true_size
from benchmarks.memory.true_size import RANK, adapted, at_random, converted, in_dtype, masked

# Transformers makes a mask for every kind of attention that it knows masks of. A batch without
# padding trains without one; fake tensors would get one all the same (2·T² bytes).
ATTENTION = "sdpa_without_mask"
BASES = ("bf16", "nf4")
SHARES = (0.75, 0.3, 0.1)
SEEDS = (0, 1, 2)
BLOCK, NESTED_BLOCK = 64, 256
PEFT, PEFT_BF16, PEFT_PREPARED, PEFT_FUSED, OURS = (
    "PEFT", "PEFT, adapters in the base's dtype", "PEFT, prepared for k-bit training",
    "PEFT, fused loss", "ours",
)  # fmt: skip
RESTRICTED = "PEFT, the same layers"
RESTRICTED_BF16 = "PEFT, the same layers, adapters in the base's dtype"
RESTRICTED_FUSED = "PEFT, the same layers, fused loss"


class Row(NamedTuple):
    """One model to count.

    Attributes:
        contestant: Whose code.
        share: Of the layers, how many are open.
        position: "all", "top" (next to the output), "bottom" or "scattered".
        seed: Of the scattering.
        adapt: What is done to the frozen base on the meta device.
    """

    contestant: str
    share: float
    position: str
    seed: int | None
    adapt: Callable[[nn.Module], nn.Module]


def rows(base: str, checkpointing: bool = False) -> Iterator[Row]:
    """Every contestant; one scattering of each share but over bf16 without checkpoints."""
    yield Row(PEFT, 1.0, "all", None, adapted)
    yield Row(PEFT_BF16, 1.0, "all", None, lambda model: adapted(model, bf16=True))
    if base == "nf4":
        yield Row(PEFT_PREPARED, 1.0, "all", None, lambda model: adapted(_prepared(model)))
    yield Row(PEFT_FUSED, 1.0, "all", None, lambda model: fused(adapted(model)))
    yield Row(OURS, 1.0, "all", None, lambda model: converted(adapted(model)))
    seeds = SEEDS if base == "bf16" and not checkpointing else SEEDS[:1]
    for share in SHARES:
        for position, seed, rank_of in positions(seeds):

            def ours(model, rank_of=rank_of, share=share):
                return masked(converted(adapted(model)), rank_of(), share)

            def peft(model, bf16=False, loss=lambda model: model, rank_of=rank_of, share=share):
                return loss(restricted(model, rank_of(), share, bf16))

            yield Row(OURS, share, position, seed, ours)
            yield Row(RESTRICTED, share, position, seed, peft)
            if share < 0.5 and position != "bottom" and not seed:
                bf16 = partial(peft, bf16=True)
                yield Row(RESTRICTED_BF16, share, position, seed, bf16)
                fusing = partial(peft, loss=fused)
                yield Row(RESTRICTED_FUSED, share, position, seed, fusing)


def positions(
    seeds: tuple[int, ...],
) -> Iterator[tuple[str, int | None, Callable[[], Callable[[int], float]]]]:
    """Name, seed, and what makes a rank of a layer's position, counted from the input."""
    yield "top", None, lambda: float
    yield "bottom", None, lambda: lambda position: -float(position)
    for seed in seeds:
        yield "scattered", seed, lambda seed=seed: at_random(seed)


def fused(model: nn.Module) -> nn.Module:
    """Let PEFT's model have the loss that ours has: the same chunks, no more logits."""
    ila.lean_head(model)
    return model


def restricted(
    model: nn.Module, rank_of: Callable[[int], float], share: float, bf16: bool = False
) -> nn.Module:
    """PEFT's adapters on the layers, by name, that ``true_size.masked`` would leave open."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    scores = {name: rank_of(position) for position, name in enumerate(names)}
    chosen = ila.LayerMask(scores, dict.fromkeys(names, True)).top(share).open
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=set(chosen), task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config, low_cpu_mem_usage=True)
    return in_dtype(peft, torch.bfloat16 if bf16 else torch.float32)


def build(name: str, base: str, layers: int | None = None) -> nn.Module:
    """A frozen model in bf16 on the meta device, its blocks' layers in NF4 if ``base`` says so."""
    return without_mask(quantized(true_size.build(name, layers), base))


def without_mask(model: nn.Module) -> nn.Module:
    """Attend as a batch without padding does on real tensors: causally, and with no mask made."""
    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    model.config._attn_implementation = ATTENTION
    return model


def quantized(model: nn.Module, base: str) -> nn.Module:
    """Put ``Linear4bit`` in the place of every linear layer but the head; weights are meta."""
    if base != "nf4":
        return model
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            packed = Linear4bit(
                linear.in_features, linear.out_features, bias=linear.bias is not None,
                compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
            )  # fmt: skip
            model.set_submodule(name, packed.requires_grad_(False))
    model.is_loaded_in_4bit = model.is_quantized = True
    return model.train()


def _prepared(model: nn.Module) -> nn.Module:
    """What PEFT's documentation does first: norms, embedding and head in fp32."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def fake(model: nn.Module) -> list[Tensor]:
    """Make every tensor of a model fake; return all that it stores. Inside a ``FakeTensorMode``."""
    true_size.fake(model)
    scales: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module._parameters["weight"], state = _pack(module.weight)
            scales += [state.absmax, state.code, state.offset, state.state2.absmax]
            scales.append(state.state2.code)
    return [*model.parameters(), *model.buffers(), *scales]


def _pack(weight: Tensor) -> tuple[Any, QuantState]:
    """A fake NF4 weight for one of shape (N, K), with the tensors of double quantisation."""
    count = weight.numel()
    blocks = -(-count // BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256),
        blocksize=NESTED_BLOCK, dtype=torch.float32,
    )  # fmt: skip
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8), shape=weight.shape, code=torch.empty(16),
        blocksize=BLOCK, quant_type="nf4", dtype=torch.bfloat16, offset=torch.empty(()),
        state2=nested,
    )  # fmt: skip
    packed = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state, packed.bnb_quantized = state, True
    return packed, state

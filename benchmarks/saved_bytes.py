"""Bytes kept for backward by one forward pass with its loss, counted without the hardware.

    python -m benchmarks.saved_bytes [--model llama-2-7b|llama-3-8b|mistral-7b] [--json FILE]

Fake tensors have shapes, dtypes and storages but no memory. Autograd hands every tensor that a
backward function keeps to a hook; counted is each storage that is still kept when the loss is
there, once, unless it belongs to a parameter or a buffer. That is the graph's own memory: not
weights, gradients, optimiser state or what a kernel allocates for a moment.

Transformers hands a fake model an explicit causal mask, as it does a batch with padding; attention
of each block keeps one in the model's dtype. It is in every row, 2·B·T² bytes a block.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import ila
from ila.commands.inputs import versions
from ila.models.layer import MaskedLoraLayer
from ila.models.mlp import make_lean
from ila.runs.atomic import write_json_atomic

_COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: dict[str, tuple[type, type, dict[str, int]]] = {
    "llama-2-7b": (
        LlamaConfig,
        LlamaForCausalLM,
        {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    ),
    "llama-3-8b": (
        LlamaConfig,
        LlamaForCausalLM,
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "mistral-7b": (
        MistralConfig,
        MistralForCausalLM,
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32768},
    ),
}
GIB = 2**30
RANK, DROPOUT, OPEN = 16, 0.05, 0.3
SCATTERINGS = 5
# Where a tensor is kept: children of a block, and all that is outside of the blocks.
PLACES = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
OUTSIDE = "embedding, head, loss"


class _Kept:
    """What the graph holds in place of a tensor; it dies with that part of the graph."""

    def __init__(self, tensor: Tensor, place: str) -> None:
        self.tensor, self.place = tensor, place


def saved_bytes(model: nn.Module, compute: Callable[[], Any]) -> dict[str, int]:
    """Bytes that the graph of ``compute()`` keeps, by place; the result is alive while counting.

    A storage that several functions keep counts once, where it is met first.
    """
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: WeakSet[_Kept] = WeakSet()
    order: list[str] = [OUTSIDE]

    def pack(tensor: Tensor) -> _Kept:
        entry = _Kept(tensor, order[-1])
        kept.add(entry)
        return entry

    with _places(model, order), saved_tensors_hooks(pack, lambda entry: entry.tensor):
        result = compute()
    found: dict[int, tuple[str, int]] = {}
    for entry in kept:
        storage = entry.tensor.untyped_storage()
        if storage._cdata not in owned:
            others = found.get(storage._cdata, (entry.place, 0))
            found[storage._cdata] = (min(others[0], entry.place), storage.nbytes())
    del result
    counts = dict.fromkeys((*PLACES, OUTSIDE), 0)
    for place, count in found.values():
        counts[place] += count
    return counts


@contextmanager
def _places(model: nn.Module, order: list[str]) -> Iterator[None]:
    """Keep the place that is computing at the end of ``order``."""
    handles = []
    for name, module in model.named_modules():
        place = name.rpartition(".")[2]
        if place in PLACES:
            handles.append(
                module.register_forward_pre_hook(lambda *_, place=place: order.append(place))
            )
            handles.append(module.register_forward_hook(lambda *_: order.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build(name: str, layers: int | None = None) -> nn.Module:
    """The model in bf16 on the meta device, frozen, in training mode."""
    config_class, model_class, shape = SHAPES[name]
    shape = _COMMON | shape | ({} if layers is None else {"num_hidden_layers": layers})
    config = config_class(**shape, use_cache=False, sliding_window=None)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return model_class(config).to(torch.bfloat16).requires_grad_(False).train()


def adapt(
    base: nn.Module, dropout: float = 0.0, bf16: bool = False, empty: bool = True
) -> nn.Module:
    """PEFT's model: rank 16 on all linear layers, adapters in fp32 unless ``bf16``.

    ``empty``: the adapters are on the meta device, where the base should be.
    """
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config, low_cpu_mem_usage=empty)
    return in_dtype(model, torch.bfloat16 if bf16 else torch.float32)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the adapters a dtype, in place."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def convert(model: nn.Module) -> nn.Module:
    """Ours, in place."""
    ila.convert(model)
    return model


def masked(model: nn.Module, rank_of: Callable[[int], float], share: float = OPEN) -> nn.Module:
    """Close all but the share of layers that ``rank_of`` their position from the input favours."""
    names = [n for n, m in model.named_modules() if isinstance(m, MaskedLoraLayer)]
    scores = {name: rank_of(position) for position, name in enumerate(names)}
    ila.apply_mask(model, ila.LayerMask(scores, dict.fromkeys(names, True)).top(share))
    return model


def frozen(model: nn.Module) -> nn.Module:
    """No adapter, but a gradient down to the embedding: the floor if the first block is open."""
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    return model


def scattered(model: nn.Module, seed: int) -> nn.Module:
    return masked(model, at_random(seed))


def at_random(seed: int) -> Callable[[int], float]:
    """A rank for each position, drawn in the order of the positions."""
    generator = random.Random(seed)
    return lambda position: generator.random()


def contestants() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Row -> what is done to the base model."""
    rows: dict[str, Callable[[nn.Module], nn.Module]] = {
        "PEFT": adapt,
        "PEFT, bf16 adapters": lambda base: adapt(base, bf16=True),
        "PEFT, dropout": lambda base: adapt(base, DROPOUT),
        "frozen": frozen,
        "ours, all open": lambda base: convert(adapt(base)),
        "ours, dropout": lambda base: convert(adapt(base, DROPOUT)),
    }
    for seed in range(SCATTERINGS):
        rows[f"ours, 30 % scattered ({seed})"] = lambda base, seed=seed: scattered(
            convert(adapt(base)), seed
        )
    rows["ours, 30 % at the top"] = lambda base: masked(convert(adapt(base)), float)
    rows["frozen, lean MLP"] = lambda base: (make_lean(base), frozen(base))[1]
    return rows


def fake(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Replace every meta tensor by a fake one; call it inside a ``FakeTensorMode``."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                store[name] = made[id(tensor)]
    return model


def count(model: nn.Module, rows: int, tokens: int) -> dict[str, int]:
    """``saved_bytes`` of a model on the meta device, for a batch of rows × tokens."""
    with FakeTensorMode():
        fake(model)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        return saved_bytes(model, lambda: model(input_ids=ids, labels=ids).loss)


def measure(name: str, rows: int, tokens: int, layers: int | None = None) -> dict[str, Any]:
    """All contestants: row -> bytes by place, and in all."""
    found = {}
    for row, change in contestants().items():
        places = count(change(build(name, layers)), rows, tokens)
        found[row] = {"bytes": sum(places.values()), "by_place": places}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(options.model, options.rows, options.tokens)
    print(f"{options.model}, {options.rows} x {options.tokens} tokens, bf16, rank {RANK}: GiB kept")
    print(f"{'':26} {'all':>6} " + " ".join(f"{place:>24}" for place in (*PLACES, OUTSIDE)))
    for row, result in rows.items():
        places = " ".join(f"{n / GIB:24.2f}" for n in result["by_place"].values())
        print(f"{row:26} {result['bytes'] / GIB:6.2f} {places}")
    if options.json is not None:
        kept = {k: v for k, v in vars(options).items() if k != "json"}
        kept |= {"dtype": "bfloat16", "rank": RANK, "dropout": DROPOUT, "open": OPEN}
        document = {"environment": {"versions": versions()}, "options": kept, "rows": rows}
        write_json_atomic(options.json, document)


if __name__ == "__main__":
    main()

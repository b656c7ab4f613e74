"""Try a family: the same numbers as plain PEFT, then which parts of this library it takes.

The oracle is plain PEFT on the same weights. A closed layer is one whose adapter is zero and
frozen there. Every comparison is in fp64; a family that fails one raises, and no row is made.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import ila
from benchmarks.families.models import VOCABULARY, build
from ila.masks.names import QKV
from ila.models.blocks import find_blocks, frozen_blocks
from ila.models.edit import masked_layers
from ila.models.mlp import LEAN
from ila.models.tensors import named_layers
from ila.prefix.cache import PrefixCache
from ila.training.loop import default_collator

ROWS, LENGTH, OPEN = 4, 20, 0.3  # 80 tokens: more than the 64 up to which calls stay apart on a CPU
TOLERANCE = 1e-10


class Trial(NamedTuple):
    """A row of the table: which parts a family takes, and the reasons of the parts it does not."""

    family: str
    together: str
    lean: str
    prefix: str
    cache: str
    notes: str


def try_family(family: str) -> Trial:
    """Compare a family with plain PEFT, all open and masked, and tell which parts it takes."""
    base = build(family)
    try:
        ours = _ours(base)
    except ValueError as why:
        return Trial(family, *("refused",) * 4, _refusal(why))
    plain = _peft(base)
    compare(ours, plain, [])
    explained = ila.explain(ours, ROWS * LENGTH)
    names = sorted(masked_layers(ours, "default"))
    for closed in (scattered(names), below_the_last(ours, names)):
        compare(ours, plain, closed)
    blocks, depth = len(find_blocks(ours).layers), frozen_blocks(ours)
    with_checkpoints(ours)
    counts = [route.path == LEAN for route in explained.mlps.values()]
    return Trial(
        family,
        _word(sum(set(QKV) == set(kinds) for kinds in explained.together.values()), blocks),
        _word(sum(counts), blocks),
        f"{depth} of {blocks}" if depth else "none",
        cached(ours),
        "; ".join(_notes(explained.plain, ours)),
    )


def _word(count: int, blocks: int) -> str:
    return "yes" if count >= blocks else f"{count} of {blocks} blocks" if count else "no"


def _notes(plain: dict[str, str], model: nn.Module) -> Iterable[str]:
    yield from dict.fromkeys(plain.values())
    outside = ila.apply_mask(model, _mask(model, [])).outside
    if outside.parameters:
        yield f"adapters of {', '.join(outside.kinds)} are outside of masks"


def _refusal(why: ValueError) -> str:
    return f"no plain nn.Linear; {str(why).rpartition('; ')[2]}"


def _config() -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip


def _peft(base: nn.Module) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(copy.deepcopy(base), _config()).train()


def _ours(base: nn.Module) -> PeftModel:
    torch.manual_seed(2)
    return ila.attach(copy.deepcopy(base), _config()).train()


def scattered(names: list[str]) -> list[str]:
    """Return the layers that are closed when a random 30 % are open."""
    opened = random.Random(0).sample(names, max(1, round(OPEN * len(names))))
    return [name for name in names if name not in opened]


def below_the_last(model: nn.Module, names: list[str]) -> list[str]:
    """Return the layers that are closed when some of the last block alone are open."""
    last = {id(m) for m in find_blocks(model).layers[-1].modules()}
    layers = masked_layers(model, "default")
    inside = [name for name in names if id(layers[name]) in last]
    return [name for name in names if name not in inside[::2]]


def _mask(model: nn.Module, closed: list[str]) -> ila.LayerMask:
    names = masked_layers(model, "default")
    return ila.LayerMask(dict.fromkeys(names, 1.0), {name: name not in closed for name in names})


def compare(ours: PeftModel, plain: PeftModel, closed: list[str]) -> None:
    """Raise unless loss and gradients are those of plain PEFT with the same layers closed."""
    ila.apply_mask(ours, _mask(ours, closed))
    oracle = copy.deepcopy(plain)
    layers = named_layers(oracle, LoraLayer)
    for name in closed:
        layer = layers[name]
        nn.init.zeros_(layer.lora_B["default"].weight)
        for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            parameter.requires_grad_(False)
    assert_same(step(ours), step(oracle))


def step(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """Return the loss and the gradient of every parameter that gets one."""
    model.zero_grad(set_to_none=True)
    loss = model(**(inputs or batch())).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def rows() -> list[dict[str, list[int]]]:
    """Return rows without padding, the same in every call."""
    ids = torch.arange(ROWS * LENGTH).mul(17).remainder(VOCABULARY - 3).add(3).view(ROWS, LENGTH)
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def batch() -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows()]) for name in ("input_ids", "labels")}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise unless both have the same names, and each tensor agrees to the tolerance."""
    if set(actual) != set(expected):
        raise AssertionError(f"gradients differ: {sorted(set(actual) ^ set(expected))}")
    for name, tensor in expected.items():
        error, size = (actual[name] - tensor).abs().max(), tensor.abs().max()
        if not error <= TOLERANCE * size:
            raise AssertionError(f"{name}: off by {error:.1e} of {size:.1e}")


def with_checkpoints(model: PeftModel) -> None:
    """Raise unless a step with gradient checkpointing is the step without."""
    expected, again = step(model), copy.deepcopy(model)
    ila.gradient_checkpointing(again)
    assert_same(step(again), expected)


def cached(model: PeftModel) -> str:
    """Return "exact" if a step on cached states is the step without, or the reason against one."""
    expected = step(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            cache = PrefixCache.prepare(
                model, rows(), default_collator(model), Path(folder), progress=False
            )
        except ValueError as why:
            return f"refused: {why}"
        with cache.skipping():
            inputs = cache.collator([cache.dataset[at] for at in range(ROWS)])
            assert_same(step(model, **inputs), expected)
    return "exact"

"""The contestants at the level of one layer: what each computes from the same tensors.

A contestant maps x (M, K) to the outputs of one layer, or of several that share x, and names the
leaves whose gradients training wants. All of them hold the same values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F

import ila
from benchmarks.peers import installed
from benchmarks.peers.addmm import addmm_lora
from ila_kernels import masked_lora_linear, masked_lora_linear_group
from ila_kernels.dropout import draw_seed, keep_mask
from ila_kernels.testing import Inputs

PEFT, OURS, FROZEN = "PEFT", "ours", "frozen"
SCALE = 2.0
SEED = 7


@dataclass(frozen=True)
class Contestant:
    """One way to compute a cell.

    Attributes:
        forward: x (M, K) -> one y (M, N) for each layer.
        leaves: Name -> tensor whose gradient is wanted; ``dA 0`` is that of the first layer.
        formula: Whose costs it has in ``ila_kernels.roofline``.
        keeps: Draws the dropout masks that ``forward`` draws after the same seed, if any.
        gated: Whether it multiplies the update by the cell's gate; PEFT knows none.
    """

    forward: Callable[[Tensor], Sequence[Tensor]]
    leaves: dict[str, Tensor]
    formula: str
    keeps: Callable[[], list[Tensor]] | None = None
    gated: bool = False


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter of a contestant's own."""
    return nn.Parameter(tensor.detach().to(dtype or tensor.dtype, copy=True))


def peft_layer(z: Inputs, dtype: torch.dtype | None = None, dropout: float = 0.0) -> nn.Module:
    """PEFT's own layer over a plain linear; adapters in ``dtype`` (their own if ``None``)."""
    n, k = z.weight.shape
    base = nn.Linear(k, n, bias=False, device="meta")
    base.weight = nn.Parameter(z.weight.detach(), requires_grad=False)
    return _filled(Linear, base, z, dtype, dropout)


def packed_peft_layer(z: Inputs) -> nn.Module:
    """PEFT's own layer over an NF4 weight of bitsandbytes."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft.tuners.lora import bnb

    n, k = z.weight.shape
    base = Linear4bit(k, n, bias=False, compute_dtype=z.x.dtype, quant_type="nf4", device="meta")
    packed = Params4bit(z.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    base.weight = packed.to(z.x.device)
    return _filled(bnb.Linear4bit, base, z, None, 0.0)


def _filled(layer_class, base: nn.Module, z: Inputs, dtype, dropout: float) -> nn.Module:
    rank = z.lora_a.shape[0]
    config = LoraConfig(r=rank, lora_dropout=dropout)
    layer = layer_class(base, "default", config, r=rank, lora_alpha=SCALE * rank)
    layer.lora_A["default"].weight = leaf(z.lora_a, dtype)
    layer.lora_B["default"].weight = leaf(z.lora_b, dtype)
    return layer.train()


def ours_of(layer: nn.Module) -> nn.Module:
    """Our layer in place of PEFT's, with weights of its own."""
    ours = copy.deepcopy(layer, {id(p): p for p in layer.get_base_layer().parameters()})
    ila.convert(ours)
    return ours


def of_modules(x: Tensor, layers: Sequence[nn.Module], formula: str, keeps=None) -> Contestant:
    """A contestant that calls modules one after the other."""
    leaves = {"dx": x}
    for i, layer in enumerate(layers):
        if "default" in getattr(layer, "lora_A", ()):
            leaves[f"dA {i}"] = layer.lora_A["default"].weight
            leaves[f"dB {i}"] = layer.lora_B["default"].weight
    return Contestant(lambda x: [layer(x) for layer in layers], leaves, formula, keeps)


def of_function(zs: Sequence[Inputs], call, formula: str, dtype=None) -> Contestant:
    """A contestant that calls ``call(x, W, A, B, scale)`` for each layer."""
    ab = [(leaf(z.lora_a, dtype), leaf(z.lora_b, dtype)) for z in zs]
    leaves = {"dx": zs[0].x}
    for i, (a, b) in enumerate(ab):
        leaves |= {f"dA {i}": a, f"dB {i}": b}

    def forward(x: Tensor) -> list[Tensor]:
        pairs = zip(zs, ab, strict=True)
        return [call(x, z.weight, a, b, SCALE) for z, (a, b) in pairs]

    return Contestant(forward, leaves, formula)


def group(zs: Sequence[Inputs], impl: str, formula: str) -> Contestant:
    """Ours: layers of one x as one op."""
    weights = [z.weight for z in zs]
    a, b = [leaf(z.lora_a) for z in zs], [leaf(z.lora_b) for z in zs]
    leaves = {"dx": zs[0].x} | {f"dA {i}": t for i, t in enumerate(a)}
    leaves |= {f"dB {i}": t for i, t in enumerate(b)}
    options = {"scales": SCALE, "impl": impl}
    return Contestant(
        lambda x: masked_lora_linear_group(x, weights, a, b, **options), leaves, formula
    )


def gated(z: Inputs, gate: str, impl: str, formula: str) -> Contestant:
    """Ours with a gate: ``soft`` is γ = σ(s) with s trained; ``open`` and ``zero`` are data."""
    a, b = leaf(z.lora_a), leaf(z.lora_b)
    leaves = {"dx": z.x, "dA 0": a, "dB 0": b}
    if gate == "soft":
        score = leaf(torch.logit(z.gate.detach().float()))
        leaves["ds"] = score
        value: Callable[[], Tensor] = partial(torch.sigmoid, score)
    else:
        fixed = torch.full((1,), float(gate == "open"), device=z.x.device)
        value = partial(lambda tensor: tensor, fixed)
    options = {"scale": SCALE, "impl": impl}

    def forward(x: Tensor) -> list[Tensor]:
        return [masked_lora_linear(x, z.weight, a, b, value(), **options)]

    return Contestant(forward, leaves, formula, gated=True)


def frozen(zs: Sequence[Inputs]) -> Contestant:
    """The floor: the linear layers alone, with the gradient of x."""
    weights = [z.weight for z in zs]
    return Contestant(lambda x: [F.linear(x, w) for w in weights], {"dx": zs[0].x}, "frozen")


def peft_keeps(z: Inputs, p: float) -> list[Tensor]:
    """The mask that PEFT's dropout draws after the seed: on x in the adapters' dtype."""
    torch.manual_seed(SEED)
    ones = torch.ones(z.x.shape, dtype=z.lora_a.dtype, device=z.x.device)
    return [F.dropout(ones, p) != 0]


def our_keeps(z: Inputs, p: float) -> list[Tensor]:
    """The mask that ours draws after the seed, with library GEMMs."""
    torch.manual_seed(SEED)
    return [keep_mask(draw_seed(), *z.x.shape, p, z.x.device)]


def triton_keeps(z: Inputs, p: float) -> list[Tensor]:
    """The mask that our kernels draw after the seed, read off t at x = 1 and A = 1."""
    from ila_kernels.kernels.shrink import shrink

    torch.manual_seed(SEED)
    k, device = z.x.shape[1], z.x.device
    seed = int(draw_seed())
    ones = torch.ones(z.x.shape, device=device)
    return [shrink(ones, [torch.eye(k, device=device)], seed, p) != 0]


def addmm(zs: Sequence[Inputs]) -> Contestant:
    """Library GEMM and addmm, one ``autograd.Function`` a layer."""
    return of_function(zs, addmm_lora, "addmm")


def installed_peers(zs: Sequence[Inputs]) -> dict[str, Callable[[], Contestant]]:
    """What builds each peer that is installed; adapters in the dtype of x, as they want them."""
    return {
        name: lambda load=load: of_function(zs, load(), "addmm", zs[0].x.dtype)
        for name, load in installed.available().items()
    }

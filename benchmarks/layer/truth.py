"""What the layers of a cell should give: the reference, in fp64 and in the cell's own dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.layer import contestants as c
from benchmarks.layer.contestants import Contestant
from ila_kernels import reference
from ila_kernels.quant import Packed4bit
from ila_kernels.testing import Inputs

DTYPE = torch.bfloat16


class Truth:
    """Values and gradients by the reference, in fp64 and in the cell's dtype, by dropout mask."""

    def __init__(
        self, zs: Sequence[Inputs], gate: str | None, dropout_p: float, packed: bool
    ) -> None:
        self.zs, self.gate, self.dropout_p, self.packed = zs, gate, dropout_p, packed
        self.known: dict[tuple, tuple[dict[str, Tensor], ...]] = {}

    def of(self, made: Contestant, keeps: list[Tensor] | None):
        """(exact, plain) for a contestant: bare, adapted or gated, and with its dropout masks."""
        adapted = "dA 0" in made.leaves
        key = (adapted, made.gated, *(k.cpu().numpy().tobytes() for k in keeps or ()))
        if key not in self.known:
            self.known[key] = tuple(
                self._computed(dtype, keeps, adapted, made.gated)
                for dtype in (torch.float64, DTYPE)
            )
        return self.known[key]

    def _computed(self, dtype: torch.dtype, keeps, adapted: bool, gated: bool) -> dict[str, Tensor]:
        zs = [z.cast(dtype) for z in self.zs]
        x = zs[0].x.detach().requires_grad_()
        leaves, ys = {"dx": x}, []
        gate = None
        if gated and self.gate == "soft":
            score = torch.logit(self.zs[0].gate.detach().float()).to(dtype).requires_grad_()
            gate, leaves["ds"] = torch.sigmoid(score), score
        elif gated:
            gate = zs[0].gate.detach()
        keep, p = (None, 0.0) if keeps is None else (keeps[0], self.dropout_p)
        for i, (z, own) in enumerate(zip(zs, self.zs, strict=True)):
            weight = self._weight(own, z.weight.detach(), dtype)
            if not adapted:
                ys.append(x @ weight.t())
                continue
            a, b = z.lora_a.detach().requires_grad_(), z.lora_b.detach().requires_grad_()
            leaves |= {f"dA {i}": a, f"dB {i}": b}
            ys.append(reference.masked_lora_linear(x, weight, a, b, gate, None, c.SCALE, keep, p))
        grads = torch.autograd.grad(ys, list(leaves.values()), [z.dy for z in zs])
        values = {f"y {i}": y.detach() for i, y in enumerate(ys)}
        return values | dict(zip(leaves, grads, strict=True))

    def _weight(self, z: Inputs, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.packed:
            return weight
        base = c.packed_peft_layer(z).base_layer
        packed = Packed4bit(base.weight, base.weight.quant_state, DTYPE)
        return packed.dense(DTYPE).to(dtype)

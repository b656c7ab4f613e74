"""A device proves itself before it is trusted: tiny problems against the formulas in fp64, once.

On a GPU or driver that Triton does not really support, kernels have been seen to write nothing
and raise nothing (unslothai/unsloth#11614). Training on that is worse than an error.

Every form of a kernel that training launches runs at least once: each number of adapters that a
pass over x serves, outputs alone and joined, input gradients alone and added to another's, sums
with their shares, all of it with and without dropout. A gate, one more number to read, is there in
some of them. That is 68 launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ila_kernels.choice import preference
from ila_kernels.config import ADAPTERS_PER_PASS
from ila_kernels.device import is_capturing
from ila_kernels.eager import Needs
from ila_kernels.group import Member
from ila_kernels.kernels import group
from ila_kernels.kernels.grad_a import Adapter, grad_a
from ila_kernels.kernels.joined_gemm import outputs
from ila_kernels.kernels.shrink import shrink

_passed: set[tuple[torch.device, str | None]] = set()

SMALL = (37, 48, 40, 4)
# Rows that a tensor descriptor takes, and more of them than the smallest tile has: `form` sends
# them to the persistent form of the GEMM where that is chosen.
ALIGNED = (80, 72, 136, 4)
SCALE = 0.5
# Shape, dtype, members, dropout. Of two members the first has a gate.
# Not bfloat16: the oldest GPUs that Triton supports do not have it.
PROBLEMS = (
    (SMALL, torch.float32, 1, 0.0),
    (SMALL, torch.float16, 1, 0.3),
    (ALIGNED, torch.float16, 2, 0.0),
    (ALIGNED, torch.float16, 2, 0.3),
)


def ensure(device: torch.device) -> None:
    """Check a device the first time it is met; waits for it then, and never again.

    Another form of the GEMM (``prefer``) is other code, so it is checked anew.

    Raises:
        RuntimeError: If a result of the kernels is not that of the formulas in fp64, or if the
            device is met for the first time while a CUDA graph is captured.
    """
    checked = device, preference().gemm
    if checked in _passed:
        return
    if is_capturing():
        raise RuntimeError(
            f"the Triton kernels are checked once on {device} before their first use, and that "
            "cannot be part of a CUDA graph; run one step before the capture"
        )
    check(device)
    _passed.add(checked)


@torch.no_grad()
def check(device: torch.device) -> None:
    """Compare every result of small fp32 and fp16 problems with the formulas in fp64."""
    with torch.cuda.device(device):
        for i, (shape, dtype, members, dropout_p) in enumerate(PROBLEMS):
            problem = f"of a {shape} {dtype} problem, dropout {dropout_p}"
            _check(shape, dtype, members, dropout_p, device, i, problem)


def _check(shape, dtype, count, dropout_p, device, number, problem) -> None:
    # Other values in each problem: results of the last one may lie in the memory of this one.
    generator = torch.Generator().manual_seed(number)
    x, members, dys = _drawn(shape, count, dropout_p, generator, dtype, device)
    keeps = [_keep(x, m, dropout_p) for m in members]
    seeds = [int(m.seed) for m in members] if dropout_p else None
    every_t = shrink(x, [m.lora_a for m in members], seeds, dropout_p)
    ys, ts = group.forward(x, members[:count], dropout_p)
    saved = [m._replace(t=t, needs=_needs(m)) for m, t in zip(members[:count], ts, strict=True)]
    dx, grads = group.backward(dys[:count], x, saved, dropout_p)
    columns = zip(members, dys, keeps, strict=True)
    exact = [_exact(x, m, dy, keep, dropout_p) for m, dy, keep in columns]
    found = [("t", t, right["t"]) for t, right in zip(every_t, exact, strict=True)]
    found += _grads_of_a(x, members, every_t, keeps, dropout_p)
    found += _joined(x, [z._replace(gate=None) for z in members], every_t)
    found.append(("dx", dx, sum(right["dx"] for right in exact[:count])))
    for t, y, grad, right in zip(ts, ys, grads, exact[:count], strict=True):
        own = {"t": t, "y": y, "dA": grad.lora_a, "dB": grad.lora_b}
        own |= {} if grad.gate is None else {"dγ": grad.gate}
        found += [(name, ours, right[name]) for name, ours in own.items()]
    for name, ours, right in found:
        _compare(name, ours, right, problem, device)


def _drawn(
    shape, count, dropout_p, generator, dtype, device
) -> tuple[Tensor, list[Member], list[Tensor]]:
    (m, k, n, r), members, dys = shape, [], []

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    for i in range(ADAPTERS_PER_PASS):
        seed = torch.tensor([2**61 + i], device="cpu") if dropout_p else None
        gate = normal(1) if count > 1 and i == 0 else None
        members.append(Member(normal(n, k), normal(r, k), normal(n, r), gate, None, seed, SCALE))
        dys.append(normal(m, n))
    return normal(m, k), members, dys


def _grads_of_a(x, members, us, keeps, dropout_p) -> list[tuple[str, Tensor, Tensor]]:
    """Return every dA from one pass over x, the first alone, and the expected values."""
    seeds = [None if m.seed is None else int(m.seed) for m in members]
    rows = zip(us, seeds, members, strict=True)
    adapters = [Adapter(u, seed, m.scale, None, u.dtype) for u, seed, m in rows]
    das = [*grad_a(x, adapters, dropout_p), *grad_a(x, adapters[:1], dropout_p)]
    exact = [
        m.scale * u.cpu().double().t() @ (x.cpu().double() * keep / (1 - dropout_p))
        for u, m, keep in zip(us, members, keeps, strict=True)
    ]
    return [("dA", da, right) for da, right in zip(das, exact + exact[:1], strict=True)]


def _joined(x, members, us) -> list[tuple[str, Tensor, Tensor]]:
    """Return outputs of three layers, and of two, from one launch, and the expected values."""
    ys = [*outputs(x, members, us), *outputs(x, members[:2], us[:2])]
    wide = x.cpu().double()
    exact = [
        wide @ m.weight.cpu().double().t()
        + m.scale * u.cpu().double() @ m.lora_b.cpu().double().t()
        for m, u in zip(members, us, strict=True)
    ]
    return [("y", y, right) for y, right in zip(ys, exact + exact[:2], strict=True)]


def _needs(m: Member) -> Needs:
    return Needs(True, weight=False, lora_a=True, lora_b=True, gate=m.gate is not None, bias=False)


def _keep(x: Tensor, m: Member, dropout_p: float) -> Tensor:
    """Read the mask of a member off the t of x = 1 and A = 1."""
    if m.seed is None:
        return torch.ones(())
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    (t,) = shrink(torch.ones_like(x), [one], [int(m.seed)], dropout_p)
    return (t != 0).cpu().double()


def _exact(x: Tensor, m: Member, dy: Tensor, keep: Tensor, dropout_p: float) -> dict[str, Tensor]:
    """Compute every result of one member by its definition."""
    # Not by autograd: inside an op, where a compiled graph gets here, it records nothing.
    gate = torch.ones(1) if m.gate is None else m.gate
    tensors = (x, dy, m.weight, m.lora_a, m.lora_b, gate)
    x, dy, w, a, b, gate = (z.cpu().double() for z in tensors)
    kept, factor = keep / (1 - dropout_p), gate * m.scale
    t, u = (x * kept) @ a.t(), dy @ b
    return {
        "t": t,
        "y": x @ w.t() + factor * t @ b.t(),
        "dx": dy @ w + factor * (u @ a) * kept,
        "dA": factor * u.t() @ (x * kept),
        "dB": factor * dy.t() @ t,
        "dγ": m.scale * (u * t).sum(),
    }


def _compare(name: str, ours: Tensor, right: Tensor, problem: str, device: torch.device) -> None:
    # Coarse: it tells work from no work, and the tests tell right from nearly right.
    error = (ours.cpu().double() - right).abs().max() / right.abs().max()
    if not error < 16 * torch.finfo(torch.float16).eps:
        raise RuntimeError(
            f"the Triton kernels compute wrong results on {device}: {name} {problem} is off by "
            f"{error:.2g} of its size; use impl='eager' there and report the GPU, its driver and "
            "the version of Triton"
        )

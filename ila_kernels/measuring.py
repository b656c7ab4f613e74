"""Time one kind of call by each implementation that runs: forward and backward of the op."""

from __future__ import annotations

import datetime
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ila_kernels import paths
from ila_kernels.device import machine_of, target_of
from ila_kernels.dispatch import run_group, run_linear
from ila_kernels.dropout import draw_seed
from ila_kernels.group import Member
from ila_kernels.ops import LinearCall
from ila_kernels.verdict import CANDIDATES, Cell, Verdict

Step = Callable[[], Sequence[Tensor]]
Timer = Callable[[Step], float]

WARM_UPS = 3
# Least error, relative to the size of a result, that is called wrong. Coarse: it tells work from no
# work, as the self-check does; the tests tell right from nearly right.
WRONG = 0.03


class Problem:
    """Random tensors of one kind of call; x, A and B want gradients, as in training."""

    def __init__(self, cell: Cell, dropout_p: float, device: torch.device):
        def normal(*shape: int, dtype: str = cell.dtype, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, dtype=getattr(torch, dtype), device=device).mul_(std)

        def adapter(*shape: int, std: float) -> Tensor:
            return normal(*shape, dtype=cell.adapter_dtype, std=std).requires_grad_()

        k, r, self.dropout_p = cell.k, cell.r, dropout_p
        self.x = normal(cell.rows, k).requires_grad_()
        self.dys = [normal(cell.rows, n) for n in cell.ns]
        self.members = []
        for n in cell.ns:
            a, b = adapter(r, k, std=k**-0.5), adapter(n, r, std=r**-0.5)
            seed = draw_seed() if dropout_p > 0.0 else None
            self.members.append(Member(normal(n, k, std=k**-0.5), a, b, None, None, seed, 1.0))

    def step(self, impl: str) -> list[Tensor]:
        """Run forward and backward; return every y and gradient."""
        if len(self.members) == 1:
            m = self.members[0]
            arguments = (m.weight, m.lora_a, m.lora_b, None, None, m.seed, m.scale)
            ys = [run_linear(LinearCall(self.x, *arguments, self.dropout_p, impl))]
        else:
            ys = list(run_group(self.x, self.members, self.dropout_p, impl))
        wanted = [self.x, *(t for m in self.members for t in (m.lora_a, m.lora_b))]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, wanted, self.dys)]

    def refuse_pointers(self) -> None:
        """Raise if the pointer form of the GEMM would run in place of the persistent one."""
        from ila_kernels.kernels.lowrank_gemm import form

        for m in self.members:
            taken, why = form(self.x, m.weight.t(), target_of(self.x), "persistent")
            if taken != "persistent":
                raise RuntimeError(why)


def measure(
    cell: Cell, dropout_p: float, device: torch.device, timer: Timer, rounds: int
) -> Verdict:
    """Time every candidate that runs and is right, in interleaved rounds of rotating order.

    Raises:
        RuntimeError: If eager itself cannot run, for want of memory say.
    """
    problem = Problem(cell, dropout_p, device)
    expected = problem.step("eager")
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for candidate in CANDIDATES:
        try:
            _prove(problem, candidate, expected, device)
        except Exception as error:  # compilers, drivers and allocators raise errors of any class
            left_out[candidate] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[candidate] = functools.partial(problem.step, candidate)
    del expected
    ms: dict[str, list[float]] = {candidate: [] for candidate in steps}
    order = list(steps)
    for _ in range(rounds):
        for candidate in order:
            ms[candidate].append(timer(steps[candidate]))
        order = [*order[1:], order[0]]
    times = {candidate: tuple(column) for candidate, column in ms.items()}
    return Verdict(machine_of(device), cell, times, datetime.date.today().isoformat(), left_out)


def _prove(
    problem: Problem, candidate: str, expected: Sequence[Tensor], device: torch.device
) -> None:
    """Check and warm up a candidate; raise if it does not run or its results are not eager's."""
    if candidate == "persistent":
        problem.refuse_pointers()
    paths.ensure_checked(candidate, device)
    for _ in range(WARM_UPS):
        results = problem.step(candidate)
    if problem.dropout_p > 0.0:  # its masks are not eager's
        return
    for got, right in zip(results, expected, strict=True):
        error = (got.float() - right.float()).norm() / right.float().norm()
        if not error < WRONG:
            raise RuntimeError(f"wrong results, off by {error.item():.2g} of their size")


class CudaTimer:
    """Milliseconds of a step by the GPU's own clock, the L2 cache flushed before it.

    The median of three: one sample of a round.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # More than any L2 cache that we know of (126 MB).
        self.flushed = torch.empty(2**28, dtype=torch.uint8, device=device)

    def __call__(self, step: Step) -> float:
        """Run the step three times and return the median."""
        with torch.cuda.device(self.device):
            return statistics.median(self._once(step) for _ in range(3))

    def _once(self, step: Step) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

"""What a set of layers costs to train, counted: parameters, bytes held, FLOPs and bytes moved.

A step of a block (q/k/v, o, gate/up, down: what reads one x) is *reached* by backward, *passed* on
to what is below, and its layers are *opened*, as ``ila.price.knapsack.Step`` says. Linears are
counted by ``ila_kernels.roofline``. Beside them, for M tokens in rows of T, hidden size H, MLP of
F, heads of D in all, e bytes an element:

    q/k/v reached    attention backward; keeps q, k, v and its output, 4·M·D, and a mask
    q/k/v passed     their norm, in fp32; keeps 4·M·(H + 1) bytes
    gate/up reached  silu(gate) ⊙ up, recomputed; keeps gate and up, 2·M·F
    gate/up passed   their norm

Bytes held are those that autograd keeps, to the byte (the tests compare), but for two that are
counted too high: gate where up_proj alone is the lowest open step, and cos and sin where no
attention keeps them. FLOPs and bytes moved become time through a ``Price``: the ceilings of a GPU
(``ceiling_price``), or rates fitted to measured steps (``ila.price.speed``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ila.masks.names import KINDS, STEPS, parse_module_name
from ila.price.knapsack import CostTable, Step
from ila.price.shapes import Shape
from ila_kernels.roofline import Ceiling, Cost, backward_cost, forward_cost, time_bound_ms

QKV, OUTPUT, GATE_UP, DOWN = range(4)
_TRAINED = frozenset({"lora_a", "lora_b"})
_ADAM_BYTES = 12  # fp32: the gradient and two moments


class Work(NamedTuple):
    """What takes time: FLOPs of GEMMs, bytes moved, and open layers, for what none avoids."""

    flops: int = 0
    bytes: int = 0
    layers: int = 0

    def plus(self, other: Work) -> Work:
        """The sum."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


Price = Callable[[Work], int]


@dataclass(frozen=True)
class Costs:
    """One step of a block, as ``Step``, by kind and not by name; in numbers or in ``Search``."""

    reached: Any = 0
    passed: Any = 0
    shared: tuple[Any, Any] = (0, 0)
    own: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def priced(self, price: Price) -> Costs:
        """Each ``Search`` in numbers."""
        own = {kind: (price(low), price(high)) for kind, (low, high) in self.own.items()}
        return Costs(price(self.reached), price(self.passed), (0, 0), own)


def parameter_table(shape: Shape, names: Iterable[str]) -> CostTable:
    """Trainable parameters of the open layers."""
    count = shape.adapter_parameters
    block = [Costs(own={kind: (count(kind), count(kind)) for kind in step}) for step in STEPS]
    return _table(shape, names, 0, block)


def memory_table(shape: Shape, names: Iterable[str]) -> CostTable:
    """Bytes held when backward begins, without checkpointing: the peak of what training keeps.

    Frozen weights; all adapters, those of closed layers too, which ``apply_mask`` sets aside;
    gradient and both AdamW moments of the open ones; what autograd keeps for backward, the gradient
    that a lean head makes in forward included. What kernels, a chunk of logits
    (``ila.models.lean_loss.CHUNK_BYTES``, and half of it in 16 bits) and the allocator take for a
    moment is on top.
    """
    names, m, e = list(names), shape.tokens, shape.base_bytes
    norm = 4 * m * (shape.hidden + 1)
    attention = 4 * m * shape.attention * e + 4 * m * shape.heads + shape.rows * shape.length**2 * e
    fixed = shape.weight_bytes() + norm
    fixed += m * shape.hidden * e + 9  # of a lean head: dh, the count of labels, whether it is 0
    fixed += 2 * shape.length * shape.head_dim * e  # cos and sin, one pair for all blocks
    fixed += sum(4 * shape.adapter_parameters(_place(shape, name)[1]) for name in names)
    reached = {QKV: attention, GATE_UP: 2 * m * shape.mlp * e}
    block = []
    for at, kinds in enumerate(STEPS):
        x, t = m * shape.linear(kinds[0]).k * e, m * shape.rank * e
        own = {kind: (t + _ADAM_BYTES * shape.adapter_parameters(kind),) * 2 for kind in kinds}
        # Where a gradient passes on, down's x is made again from gate and up, which are kept, and
        # o's x is the output of an attention that keeps it.
        shared = (x, 0 if at in (OUTPUT, DOWN) else x)
        block.append(Costs(reached.get(at, 0), norm if at in reached else 0, shared, own))
    return _table(shape, names, fixed, block)


def time_table(shape: Shape, names: Iterable[str], price: Price, fixed: int) -> CostTable:
    """Time of a step in the unit of ``price``; ``fixed`` is forward work, head and loss."""
    block = [step.priced(price) for step in _work_of_block(shape)]
    return _table(shape, names, fixed, block)


def fixed_work(shape: Shape) -> list[Work]:
    """What every step does: all blocks forward, the head in both directions."""
    m, e, h = shape.tokens, shape.base_bytes, shape.hidden
    blocks = [_work(forward_cost("frozen", shape.linear(kind))) for kind in KINDS]
    blocks.append(Work(4 * m * shape.length * shape.attention, 4 * m * shape.attention * e))
    blocks.append(Work(0, m * (3 * shape.mlp * e + 2 * 10 * h * e)))
    logits = m * shape.vocabulary
    head = Work(4 * logits * h, (2 * e + 4 * 4) * logits + 2 * e * h * shape.vocabulary)
    return blocks * shape.blocks + [head]


def ceiling_price(ceiling: Ceiling) -> Price:
    """Picoseconds at a GPU's data-sheet peaks: a bound from below, without launches."""
    return lambda work: round(time_bound_ms(work.flops, work.bytes, ceiling) * 1e9)


def _work_of_block(shape: Shape) -> list[Costs]:
    m, e, d = shape.tokens, shape.base_bytes, shape.attention
    norm = Work(0, m * shape.hidden * (2 * 4 + 4 * e))  # fp32 kept and made, dy, two dx, their sum
    # Five products of M·T·D where forward has two; q, k, v, output and their gradients.
    attention = Work(10 * m * shape.length * d, 12 * m * d * e)
    swiglu = Work(0, 5 * m * shape.mlp * e)
    reached = {QKV: attention, GATE_UP: swiglu}
    block = []
    for at, kinds in enumerate(STEPS):
        passed = norm if at in reached else Work()
        for kind in kinds:
            passed = passed.plus(_work(backward_cost("frozen", shape.linear(kind), {"x"})))
        passed = passed.plus(Work(0, 3 * m * shape.linear(kinds[0]).k * e * (len(kinds) - 1)))
        own = {kind: (_opened(shape, kind, False), _opened(shape, kind, True)) for kind in kinds}
        block.append(Costs(reached.get(at, Work()), passed, (Work(), Work()), own))
    return block


def _opened(shape: Shape, kind: str, passed: bool) -> Work:
    """What an adapter adds to its layer, forward, backward and in AdamW."""
    p, dx = shape.linear(kind), frozenset({"x"} if passed else ())
    work = _work(forward_cost("addmm", p), forward_cost("frozen", p))
    work = work.plus(
        _work(backward_cost("addmm", p, _TRAINED | dx), backward_cost("frozen", p, dx))
    )
    return work.plus(Work(0, 28 * shape.adapter_parameters(kind), 1))


def _work(cost: Cost, less: Cost | None = None) -> Work:
    less = Cost(0, 0) if less is None else less
    return Work(cost.flops - less.flops, cost.bytes - less.bytes)


def _table(shape: Shape, names: Iterable[str], fixed: int, block: list[Costs]) -> CostTable:
    """The steps of every block, with the layers of ``names`` that are in them."""
    layers: dict[tuple[int, str], str] = {}
    for name in names:
        place = _place(shape, name)
        if place in layers:
            raise ValueError(f"layers {layers[place]!r} and {name!r} have the same place")
        layers[place] = name
    steps = []
    for number in range(shape.blocks):
        for costs, kinds in zip(block, STEPS, strict=True):
            found = {layers[number, k]: costs.own[k] for k in kinds if (number, k) in layers}
            steps.append(Step(tuple(found), costs.reached, costs.passed, costs.shared, found))
    return CostTable(fixed, tuple(steps))


def _place(shape: Shape, name: str) -> tuple[int, str]:
    """Block and kind of a layer."""
    place = parse_module_name(name)
    if place is None or place[1] not in KINDS:
        raise ValueError(
            f"a budget counts the layers {', '.join(KINDS)} of Llama blocks, got {name!r}"
        )
    if place[0] >= shape.blocks:
        raise ValueError(f"layer {name!r} is in none of the model's {shape.blocks} blocks")
    return place

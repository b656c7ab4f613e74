"""Count the cost of training a set of layers: parameters, bytes held, FLOPs and bytes moved.

A group of a block (q/k/v, o, `gate`/`up`, `down`: the layers that read one x) is *reached* by
backward and *passed* on the way down, and its layers are *opened* (``ila.price.knapsack.Group``).
``ila_kernels.roofline`` counts the linears. Beside them, for M tokens in rows of T, hidden size H,
MLP of F, D for all heads together, e bytes an element:

    q/k/v reached    attention backward; keeps q, k, v and its output, 4·M·D, and a mask
    q/k/v passed     their norm, in fp32; keeps 4·M·(H + 1) bytes
    gate/up reached  silu(gate) ⊙ up, recomputed; keeps gate and up, 2·M·F
    gate/up passed   their norm

Bytes held are the bytes that autograd keeps, exactly (the tests compare). Two counts are too high:
`gate` where up_proj alone is the lowest open group, and cos and sin where no attention keeps them.
A ``Price`` turns FLOPs and bytes moved into time: the ceilings of a GPU (``ceiling_price``),
or rates fitted to measured steps (``ila.price.speed``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ila.masks.names import DOWN, GATE_UP, GROUPS, KINDS, OUTPUT, QKV, parse_module_name
from ila.models.lean_loss import CHUNK_BYTES
from ila.price.knapsack import CostTable, Group
from ila.price.shapes import Shape
from ila_kernels.roofline import Ceiling, Cost, backward_cost, forward_cost, time_bound_ms

_TRAINED = frozenset({"lora_a", "lora_b"})
_ADAM_BYTES = 12  # fp32: the gradient and two moments


class Work(NamedTuple):
    """Work of a step: FLOPs of GEMMs, bytes moved, and open layers, each with a fixed cost."""

    flops: int = 0
    bytes: int = 0
    layers: int = 0

    def plus(self, other: Work) -> Work:
        """Return the sum."""
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.layers + other.layers)


Price = Callable[[Work], int]
Amount = TypeVar("Amount", int, Work)


@dataclass(frozen=True)
class GroupCosts(Generic[Amount]):
    """Costs of a group, as in ``Group``, for kinds of layers; in numbers or as ``Work``."""

    reached: Amount
    passed: Amount
    shared: tuple[Amount, Amount]
    own: Mapping[str, tuple[Amount, Amount]]


def _priced(costs: GroupCosts[Work], price: Price) -> GroupCosts[int]:
    own = {kind: (price(low), price(high)) for kind, (low, high) in costs.own.items()}
    return GroupCosts(price(costs.reached), price(costs.passed), (0, 0), own)


def parameter_table(shape: Shape, names: Iterable[str]) -> CostTable:
    """Count the trainable parameters of the open layers."""
    block = []
    for kinds in GROUPS:
        own = {kind: (shape.adapter_parameters(kind),) * 2 for kind in kinds}
        block.append(GroupCosts(0, 0, (0, 0), own))
    return _table(shape, names, 0, block)


def memory_table(shape: Shape, names: Iterable[str]) -> CostTable:
    """Count the bytes held when backward begins, without checkpointing.

    The sum holds the frozen weights, all adapters (also of closed layers, which ``apply_mask`` sets
    aside), gradient and both AdamW moments of the open adapters, and the tensors that autograd
    keeps for backward, with the gradient that a lean head makes in forward. It leaves out the
    buffers of kernels, a chunk of logits (``ila.models.lean_loss.CHUNK_BYTES`` in fp32, half of it
    in 16 bits), and the short-lived memory of the allocator.
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
    for kinds in GROUPS:
        x, t = m * shape.linear(kinds[0]).k * e, m * shape.rank * e
        own = {kind: (t + _ADAM_BYTES * shape.adapter_parameters(kind),) * 2 for kind in kinds}
        # Above the lowest open group, `gate` and `up` are kept and make the x of down_proj again,
        # and attention keeps its output, the x of o_proj.
        shared = (x, 0 if kinds in (OUTPUT, DOWN) else x)
        passed = norm if kinds in reached else 0
        block.append(GroupCosts(reached.get(kinds, 0), passed, shared, own))
    return _table(shape, names, fixed, block)


def time_table(shape: Shape, names: Iterable[str], price: Price, fixed: int) -> CostTable:
    """Return times of a step in the unit of ``price``; ``fixed`` is forward, head and loss."""
    block = [_priced(costs, price) for costs in _work_of_block(shape)]
    return _table(shape, names, fixed, block)


def fixed_work(shape: Shape) -> list[Work]:
    """List the work of every step: all blocks forward, the lean head and its loss."""
    m, e, h = shape.tokens, shape.base_bytes, shape.hidden
    blocks = [_work(forward_cost("frozen", shape.linear(kind))) for kind in KINDS]
    blocks.append(Work(4 * m * shape.length * shape.attention, 4 * m * shape.attention * e))
    blocks.append(Work(0, m * (3 * shape.mlp * e + 2 * 10 * h * e)))
    return blocks * shape.blocks + [head_work(shape)]


def head_work(shape: Shape) -> Work:
    """Return the work of a lean head: two products over the tokens that are labels.

    A chunk reads W twice, and writes and reads its logits and their gradients once; the blocks of
    softmax stay in a cache. h is read, dh is cleared and written.
    """
    e, logits = shape.base_bytes, shape.labels * shape.vocabulary
    chunks = math.ceil(logits * 4 / CHUNK_BYTES)
    weights = 2 * chunks * shape.hidden * shape.vocabulary
    states = (shape.tokens + 4 * shape.labels) * shape.hidden
    return Work(4 * logits * shape.hidden, e * (4 * logits + weights + states))


def ceiling_price(ceiling: Ceiling) -> Price:
    """Return the price in picoseconds at a GPU's data-sheet peaks: a lower bound, no launches."""
    return lambda work: round(time_bound_ms(work.flops, work.bytes, ceiling) * 1e9)


def _work_of_block(shape: Shape) -> list[GroupCosts[Work]]:
    m, e, d = shape.tokens, shape.base_bytes, shape.attention
    norm = Work(0, m * shape.hidden * (2 * 4 + 4 * e))  # fp32 kept and made, dy, two dx, their sum
    # Five products of M·T·D where forward has two; q, k, v, output and their gradients.
    attention = Work(10 * m * shape.length * d, 12 * m * d * e)
    swiglu = Work(0, 5 * m * shape.mlp * e)
    reached = {QKV: attention, GATE_UP: swiglu}
    block = []
    for kinds in GROUPS:
        passed = norm if kinds in reached else Work()
        for kind in kinds:
            passed = passed.plus(_work(backward_cost("frozen", shape.linear(kind), {"x"})))
        passed = passed.plus(Work(0, 3 * m * shape.linear(kinds[0]).k * e * (len(kinds) - 1)))
        own = {kind: (_opened(shape, kind, False), _opened(shape, kind, True)) for kind in kinds}
        block.append(GroupCosts(reached.get(kinds, Work()), passed, (Work(), Work()), own))
    return block


def _opened(shape: Shape, kind: str, passed: bool) -> Work:
    """Return the work that an adapter adds to its layer, forward, backward and in AdamW."""
    p, dx = shape.linear(kind), frozenset({"x"} if passed else ())
    work = _work(forward_cost("addmm", p), forward_cost("frozen", p))
    work = work.plus(
        _work(backward_cost("addmm", p, _TRAINED | dx), backward_cost("frozen", p, dx))
    )
    return work.plus(Work(0, 28 * shape.adapter_parameters(kind), 1))


def _work(cost: Cost, less: Cost | None = None) -> Work:
    less = Cost(0, 0) if less is None else less
    return Work(cost.flops - less.flops, cost.bytes - less.bytes)


def _table(
    shape: Shape, names: Iterable[str], fixed: int, block: list[GroupCosts[int]]
) -> CostTable:
    """Put the layers of ``names`` into the groups of every block."""
    layers: dict[tuple[int, str], str] = {}
    for name in names:
        place = _place(shape, name)
        if place in layers:
            raise ValueError(f"layers {layers[place]!r} and {name!r} have the same place")
        layers[place] = name
    groups = []
    for number in range(shape.blocks):
        for costs, kinds in zip(block, GROUPS, strict=True):
            own = {layers[number, k]: costs.own[k] for k in kinds if (number, k) in layers}
            groups.append(Group(tuple(own), costs.reached, costs.passed, costs.shared, own))
    return CostTable(fixed, tuple(groups))


def _place(shape: Shape, name: str) -> tuple[int, str]:
    """Return block and kind of a layer."""
    place = parse_module_name(name)
    if place is None or place[1] not in KINDS:
        raise ValueError(
            f"a budget counts the layers {', '.join(KINDS)} of Llama blocks, got {name!r}"
        )
    if place[0] >= shape.blocks:
        raise ValueError(f"layer {name!r} is in none of the model's {shape.blocks} blocks")
    return place

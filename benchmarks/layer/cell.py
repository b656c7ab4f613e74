"""One cell of the layer benchmark: layers that share x, and every contestant that computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.ceiling import ceiling
from benchmarks.harness.gate import assert_within_rounding
from benchmarks.harness.memory import peak_tensor_bytes
from benchmarks.harness.session import Options
from benchmarks.harness.timing import Run, calls_for, interleaved, ratio, spread
from benchmarks.layer import contestants as c
from benchmarks.layer.contestants import FROZEN, OURS, PEFT, SEED, Contestant
from benchmarks.layer.shapes import shape
from benchmarks.layer.truth import DTYPE, Truth
from benchmarks.peers.installed import available
from ila_kernels.roofline import Cost, Problem, group_backward_cost, group_forward_cost
from ila_kernels.roofline import time_bound_ms as time_bound
from ila_kernels.testing import Inputs, make_inputs

COMPILED, BASE_DTYPE = "PEFT, compiled", "PEFT, base dtype"
# On a GPU: name -> `impl` of the op, and its costs in `ila_kernels.roofline`.
KERNELS = {"ours, hybrid": ("hybrid", "hybrid"), "ours, Triton": ("triton", "fused")}
ONE_BY_ONE = "ours, one by one"
ADAPTERS = torch.float32
DROPOUT, SOFT = 0.05, 0.7
# A sample of all calls together; below it the clock and the interpreter's jitter show.
LEAST_MS = 4.0
PHASES = ("forward", "backward")


@dataclass(frozen=True, eq=False)
class LayerCell:
    """Layers of a model by name, at M tokens and rank R.

    Attributes:
        layers: ``"q"``, or several of one x: ``"q k v"``.
        gate: ``None``, ``"open"`` (γ = 1, a tensor), ``"zero"`` (γ = 0, a tensor), ``"soft"``
            (γ = σ(s), trained) or ``"closed"`` (the layer's adapter set aside).
        compiled: Whether ``torch.compile`` of PEFT takes part; it compiles for seconds.
        strict: Whether one of our kernels that is wrong fails the cell; else it is left out by
            name, as a peer is.
    """

    options: Options
    model: str
    layers: str
    m: int
    r: int
    gate: str | None = None
    dropout: bool = False
    packed: bool = False
    compiled: bool = False
    strict: bool = True
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extra = f", gate {self.gate}" if self.gate else ""
        extra += f", dropout {DROPOUT}" * self.dropout + ", NF4" * self.packed
        return f"{self.model} {self.layers}, M {self.m}, R {self.r}{extra}"

    @cached_property
    def contestants(self) -> list[str]:
        """Names, without building anything."""
        cuda, several = self.options.device.type == "cuda", " " in self.layers
        plain = not (self.dropout or self.packed or self.gate)
        names = [PEFT, OURS, FROZEN] if not self.packed else [PEFT, OURS]
        if several:
            names.insert(2, ONE_BY_ONE)
        if plain:
            names += [BASE_DTYPE, "addmm"] + [COMPILED] * (self.compiled and not several)
            names += available() if not several else []
        if cuda and not self.packed and self.gate != "closed":
            names += KERNELS
        return names

    @property
    def rounds(self) -> int:
        return self.options.rounds or self.options.pick(smoke=3, quick=15, full=31)

    def conditions(self) -> dict[str, Any]:
        best, source = ceiling(self.options.device, DTYPE)
        return {
            "rounds": self.rounds,
            "dtype": str(DTYPE).removeprefix("torch."),
            "adapters": str(ADAPTERS).removeprefix("torch."),
            "scale": c.SCALE,
            "left_out": self.left_out,
            "ceiling": asdict(best) | {"source": source},
        }

    # --- tensors and contestants

    def inputs(self) -> list[Inputs]:
        """The tensors of each layer; one seed, so that all have the same x."""
        gate = {"open": 1.0, "zero": 0.0, "soft": SOFT}.get(self.gate)
        requires = {"x", "lora_a", "lora_b"} - ({"lora_a", "lora_b"} if self.is_bare else set())
        options = {"dtype": DTYPE, "adapter_dtype": ADAPTERS, "device": self.options.device}
        shapes = [shape(self.model, layer) for layer in self.layers.split()]
        return [
            make_inputs(self.m, k, n, self.r, gate=gate, requires=requires, **options)
            for k, n in shapes
        ]

    @property
    def is_bare(self) -> bool:
        return self.gate == "closed"

    def build(self, zs: list[Inputs]) -> dict[str, Callable[[], Contestant]]:
        """What makes each contestant of this cell."""
        z, p = zs[0], DROPOUT if self.dropout else 0.0
        if self.packed:
            layer = c.packed_peft_layer(z)
            return {
                PEFT: lambda: c.of_modules(z.x, [layer], "peft"),
                OURS: lambda: c.of_modules(z.x, [c.ours_of(layer)], "addmm"),
            }
        layers = [c.peft_layer(z, dropout=p) for z in zs]
        draws = partial(c.peft_keeps, z, p) if p else None
        our_draws = partial(c.our_keeps, z, p) if p else None
        one_by_one = partial(self._ours, zs, layers, our_draws)
        builders = {
            PEFT: lambda: c.of_modules(z.x, layers, "peft", draws),
            BASE_DTYPE: lambda: c.of_modules(z.x, [c.peft_layer(z, DTYPE) for z in zs], "peft"),
            COMPILED: lambda: self._compiled(z),
            "addmm": lambda: c.addmm(zs),
            OURS: one_by_one if len(zs) == 1 else lambda: c.group(zs, "eager", "addmm"),
            ONE_BY_ONE: one_by_one,
            FROZEN: lambda: c.frozen(zs),
        }
        builders |= {name: partial(self._by_kernels, zs, p, *how) for name, how in KERNELS.items()}
        return builders | c.installed_peers(zs)

    def _ours(self, zs, layers, draws) -> Contestant:
        if self.gate in ("open", "zero", "soft"):
            return c.gated(zs[0], self.gate, "eager", "addmm")
        ours = [c.ours_of(layer) for layer in layers]
        if self.is_bare:
            ours[0].close("default")
        return c.of_modules(zs[0].x, ours, "frozen" if self.is_bare else "addmm", draws)

    def _by_kernels(self, zs: list[Inputs], p: float, impl: str, formula: str) -> Contestant:
        from ila_kernels import masked_lora_linear

        if len(zs) > 1:
            return c.group(zs, impl, formula)
        if self.gate is not None:
            return c.gated(zs[0], self.gate, impl, formula)

        def call(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
            return masked_lora_linear(x, weight, a, b, scale=scale, dropout_p=p, impl=impl)

        made = c.of_function(zs, call, formula)
        keeps = partial(c.triton_keeps, zs[0], p) if p else None
        return Contestant(made.forward, made.leaves, made.formula, keeps)

    def _compiled(self, z: Inputs) -> Contestant:
        torch.compiler.reset()  # or this shape would be one of many of one function
        layer = c.peft_layer(z)
        made = c.of_modules(z.x, [layer], "peft")
        compiled = torch.compile(layer, dynamic=False)
        return Contestant(lambda x: [compiled(x)], made.leaves, made.formula)

    # --- the gate

    def _compare(self, zs: list[Inputs], made: Contestant, truth: Truth) -> None:
        """Compare outputs and gradients of a contestant with the reference in fp64."""
        torch.manual_seed(SEED)
        values = _values(made, [z.dy for z in zs])
        keeps = made.keeps() if made.keeps is not None else None
        exact, plain = truth.of(made, keeps)
        for name, value in values.items():
            assert_within_rounding(value, exact[name], plain[name], name)

    def check(self) -> None:
        """Check every contestant; a peer of another project that fails is left out instead.

        Raises:
            AssertionError: If a contestant computes something else.
        """
        zs = self.inputs()
        builders, truth = (
            self.build(zs),
            Truth(zs, self.gate, DROPOUT if self.dropout else 0.0, self.packed),
        )
        for name in list(self.contestants):
            try:
                self._compare(zs, builders[name](), truth)
            except AssertionError as error:
                if not self._is_spared(name):
                    raise AssertionError(f"{name}: {error}") from error
                self._leave_out(name, error)
            except Exception as error:
                if not self._is_spared(name):
                    raise
                self._leave_out(name, error)

    def _is_spared(self, name: str) -> bool:
        return name in available() or (name in KERNELS and not self.strict)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.left_out[name] = f"{type(error).__name__}: {error}"
        self.contestants.remove(name)

    # --- the measurement

    def measure(self) -> tuple[list[dict[str, Any]], Mapping[str, list[float]]]:
        zs = self.inputs()
        builders = self.build(zs)
        made = {name: builders[name]() for name in self.contestants}
        dys = [z.dy for z in zs]
        runs = {name: _run(contestant, dys) for name, contestant in made.items()}
        watch = self.options.watch
        cuda = watch.device.type == "cuda"
        calls = 1 if cuda else calls_for(runs, watch, LEAST_MS)
        times = interleaved(runs, self.rounds, watch, calls=calls, warm_up=3 if cuda else 1)
        rows = []
        for name, contestant in made.items():
            peak = peak_tensor_bytes(lambda run=runs[name]: run(_nothing, 0), watch.device)
            for phase in (*PHASES, "both"):
                own, peft = _phase(times[name], phase), _phase(times[PEFT], phase)
                row = self._row(name, contestant, phase, own, peft)
                rows.append(row | {"calls": calls, "peak_bytes": peak if phase == "both" else None})
        return rows, {name: [sum(t) / 1e3 for t in rounds] for name, rounds in times.items()}

    def _row(self, name, made: Contestant, phase: str, own: list[float], peft: list[float]) -> dict:
        compared = ratio(own, peft)
        k, n = shape(self.model, self.layers.split()[0])
        row = {
            "model": self.model, "layers": self.layers, "m": self.m, "k": k, "n": n, "r": self.r,
            "gate": self.gate, "dropout": DROPOUT if self.dropout else 0.0, "nf4": self.packed,
            "contestant": name, "phase": phase, **spread(own),
            "ratio_to_peft": compared["median"], "p10": compared["p10"], "p90": compared["p90"],
        }  # fmt: skip
        cost = None if self.packed else self._cost(made.formula, phase, "ds" in made.leaves)
        if cost is None:  # the formulas know dense weights only
            return row | dict.fromkeys(("tflop_s", "gb_s", "share_of_roofline"))
        least = self._cost("frozen" if made.formula == "frozen" else "fused", phase, False)
        bound = time_bound(least.flops, least.bytes, ceiling(self.options.device, DTYPE)[0])
        ms = row["median_ms"]
        return row | {
            "tflop_s": cost.flops / ms / 1e9,
            "gb_s": cost.bytes / ms / 1e6,
            "flop_per_byte": least.flops / least.bytes,
            "share_of_roofline": bound / ms,
        }

    def _cost(self, formula: str, phase: str, scored: bool) -> Cost:
        """FLOPs and bytes by ``ila_kernels.roofline``."""
        pairs = [shape(self.model, layer) for layer in self.layers.split()]
        members = [Problem(self.m, k, n, self.r, dropout=self.dropout) for k, n in pairs]
        needs = {"x"} if formula == "frozen" else {"x", "lora_a", "lora_b"}
        needs |= {"gate"} if scored else set()
        forward = group_forward_cost(formula, members)
        backward = group_backward_cost(formula, members, needs)
        if phase != "both":
            return {"forward": forward, "backward": backward}[phase]
        return Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)


def _values(made: Contestant, dys: list[Tensor]) -> dict[str, Tensor]:
    ys = made.forward(made.leaves["dx"])
    grads = torch.autograd.grad(list(ys), list(made.leaves.values()), dys)
    values = {f"y {i}": y.detach() for i, y in enumerate(ys)}
    return values | dict(zip(made.leaves, grads, strict=True))


def _run(made: Contestant, dys: list[Tensor]) -> Run:
    x, leaves = made.leaves["dx"], list(made.leaves.values())

    def run(mark, turn: int) -> None:
        ys = list(made.forward(x))
        mark()
        torch.autograd.grad(ys, leaves, dys)
        mark()

    return run


def _nothing() -> None:
    pass


def _phase(rounds: list[list[float]], phase: str) -> list[float]:
    if phase == "both":
        return [sum(times) for times in rounds]
    return [times[PHASES.index(phase)] for times in rounds]

"""Which forward is known, and which calls its layers on one x: read from code, not from names."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.activations import ACT2FN

from ila.models import mlp_probe
from ila.models.class_swap import subclass
from ila.models.mlp import LeanMLP, _plain
from ila.models.same_code import same_code, why_not_one_x

QKV = ("q_proj", "k_proj", "v_proj")


class Same:
    def forward(self, x):
        """Say something else."""
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj

    def swapped(self, x):
        down_proj = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return down_proj

    def summed(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        return down_proj

    def doubled(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj * 2

    def optional(self, x, more=None):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


def test_a_docstring_and_a_name_change_nothing():
    assert same_code(Same.forward, _plain)


@pytest.mark.parametrize("name", ["swapped", "summed", "doubled", "optional"])
def test_another_computation_is_other_code(name):
    assert not same_code(getattr(Same, name), _plain)


def test_a_wrapper_is_other_code():
    @functools.wraps(Same.forward)
    def wrapped(self, x):
        return 2 * Same.forward(self, x)

    assert not same_code(wrapped, _plain)
    assert not same_code(functools.partial(Same.forward, None), _plain)


class OneX:
    def forward(self, hidden_states, mask=None):
        q = self.q_norm(self.q_proj(hidden_states).view(2, 3))
        k, v = self.k_proj(hidden_states), self.v_proj(hidden_states)
        hidden_states = q + k + v
        return self.o_proj(hidden_states)


class Crossed:
    def forward(self, x, other):
        return self.q_proj(x) + self.k_proj(other) + self.v_proj(other)


class Sometimes:
    def forward(self, x, cached):
        q = self.q_proj(x)
        k, v = cached if cached is not None else (self.k_proj(x), self.v_proj(x))
        return q + k + v


class Returns:
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        if self.shares:
            return q + k
        return q + k + self.v_proj(x)


class Changed:
    def forward(self, x):
        q = self.q_proj(x)
        x = self.norm(x)
        return q + self.k_proj(x) + self.v_proj(x)


class Twice:
    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x) + self.v_proj(x)


class Keyword:
    def forward(self, x):
        return self.q_proj(x) + self.k_proj(input=x) + self.v_proj(x)


class OfAnother:
    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x) + self.inner.v_proj(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OneX, None),
        (Crossed, "does not call q_proj, k_proj, v_proj on one input"),
        (Sometimes, "calls k_proj in some cases only"),
        (Returns, "may return before it calls all of q_proj, k_proj, v_proj"),
        (Changed, "changes the input between q_proj and v_proj"),
        (Twice, "calls v_proj 2 times, not once"),
        (Keyword, "does not call q_proj, k_proj, v_proj on one input"),
        (OfAnother, "calls v_proj 0 times, not once"),
    ],
)
def test_the_source_of_a_forward_says_whether_its_layers_read_one_x(kind, why):
    found = why_not_one_x(kind, QKV)
    assert found == why or found == f"{kind.__name__}.forward {why}"


def test_a_forward_without_source_is_left():
    space = {}
    exec("def forward(self, x): return self.q_proj(x)", space)
    kind = type("Made", (), {"forward": space["forward"]})
    assert why_not_one_x(kind, QKV) == "the source of Made.forward cannot be read"


class Gated(nn.Module):
    forward = Same.forward


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_class_of_the_same_code_and_other_numbers_keeps_its_forward(monkeypatch, act):
    """Some code may have put a faster activation into transformers' class."""
    monkeypatch.setattr(mlp_probe, "_known", {})
    block, before = Gated(), torch.get_rng_state()
    block.act_fn = ACT2FN[act]
    for part in LeanMLP.parts:
        block.register_module(part, nn.Identity())
    assert LeanMLP.why_not(block) is None
    assert torch.equal(torch.get_rng_state(), before)

    forward = type(block.act_fn).forward
    monkeypatch.setattr(type(block.act_fn), "forward", lambda s, x: forward(s, x) * (1 + 2**-50))
    assert LeanMLP.why_not(block) is None  # found out once for each class
    mlp_probe._known.clear()
    assert "Gated computes other numbers" in LeanMLP.why_not(block)


@pytest.mark.parametrize("context", [FakeTensorMode, torch.inference_mode, torch.no_grad])
def test_the_comparison_runs_in_every_mode_of_the_caller(monkeypatch, context):
    monkeypatch.setattr(mlp_probe, "_known", {})
    with context(), torch.device("meta"):
        assert mlp_probe.same_numbers(Gated, subclass(LeanMLP, Gated), nn.SiLU())

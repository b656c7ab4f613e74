"""torch.func differentiates a model with our layers as it differentiates PEFT's."""

import pytest
import torch
from torch.func import functional_call, grad, grad_and_value, hessian, jvp, vjp, vmap

import ila
from ila_kernels import masked_lora_linear

# PyTorch's forward mode loads its own rules by what it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
ROWS = 12  # of 7 tokens: more than the 64 below which layers of one x stay apart on a CPU


def adapted(tiny, make, **changes):
    """A model whose attention is plain torch: PyTorch's own has no forward-mode rule on a CPU."""
    base = tiny.base(attn_implementation="eager", **changes)
    return getattr(tiny, make)(tiny.config(target_modules="all-linear"), base).train()


def loss_of(model, tiny, labels=False):
    """Loss as a function of the trained parameters and of a batch of tokens."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters, ids):
        inputs = {"input_ids": ids} | ({"labels": ids} if labels else {})
        out = functional_call(model, {**frozen, **parameters}, (), inputs)
        return out.loss if labels else out.logits.sin().sum()

    return loss, trained


def by_grad(loss, trained, ids):
    gradients, value = grad_and_value(loss)(trained, ids)
    return {**gradients, "loss": value}


def by_vjp(loss, trained, ids):
    value, pull = vjp(lambda parameters: loss(parameters, ids), trained)
    return {**pull(torch.ones_like(value))[0], "loss": value}


def by_jvp(loss, trained, ids):
    value, tangent = jvp(lambda parameters: loss(parameters, ids), (trained,), (trained,))
    return {"loss": value, "tangent": tangent}


def of_each_row(loss, trained, ids):
    return vmap(grad(loss), (None, 0))(trained, ids[:, None])


def twice(loss, trained, ids):
    name = min(name for name in trained if "lora_B" in name)
    row = trained[name][0]

    def of_a_row(values):
        changed = torch.cat([values[None], trained[name][1:]])
        return loss({**trained, name: changed}, ids[:1])

    return {"hessian": hessian(of_a_row)(row)}


@pytest.mark.parametrize("way", [by_grad, by_vjp, by_jvp, of_each_row, twice])
@pytest.mark.parametrize("make", ["attached", "converted"])
def test_every_transform_gives_what_it_gives_for_peft(tiny, make, way):
    found = []
    for kind in ("plain", make):
        model = adapted(tiny, kind)
        found.append(way(*loss_of(model, tiny), tiny.tokens(ROWS)))
    tiny.assert_close(found[1], found[0])
    assert any(value.abs().max() > 1e-3 for value in found[0].values())


@pytest.mark.parametrize("labels", [False, True])
def test_gradients_are_those_of_backward_with_a_mask_and_a_lean_head(tiny, labels):
    model = adapted(tiny, "attached")
    ila.apply_mask(model, tiny.mask(model, lambda at, name: at % 2 == 0))
    ila.lean_head(model)
    loss, trained = loss_of(model, tiny, labels)
    expected = grad(loss)(trained, tiny.tokens(ROWS))
    loss({n: p for n, p in model.named_parameters() if n in trained}, tiny.tokens(ROWS)).backward()
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    tiny.assert_close(actual, expected, tolerance=1e-6 if labels else 1e-11)  # the loss is float32


def test_after_a_transform_the_layers_are_ours_again(tiny):
    model = adapted(tiny, "attached")
    loss, trained = loss_of(model, tiny)
    seen = []
    layer = next(iter(tiny.layers(model).values()))
    handle = layer.register_forward_hook(lambda *_: seen.append(layer.route().path))
    grad(loss)(trained, tiny.tokens(ROWS))
    loss(trained, tiny.tokens(ROWS))
    handle.remove()
    assert seen == ["peft", "fused"]


def test_the_op_has_a_rule_by_its_definition_alone():
    x, w, a, b = (torch.randn(shape) for shape in ((70, 4), (5, 4), (2, 4), (5, 2)))
    expected = grad(lambda a: (x @ w.T + (x @ a.T) @ b.T).sin().sum())(a)
    found = grad(lambda a: masked_lora_linear(x, w, a, b, impl="reference").sin().sum())(a)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(lambda a: masked_lora_linear(x, w, a, b).sin().sum())(a)

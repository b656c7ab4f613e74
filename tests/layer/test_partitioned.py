"""Weights that are not there outside of a module's forward, as ZeRO-3 keeps them; simulated.

DeepSpeed itself is not run here: hooks on every module stand for it, which bring the weights in
before the module's forward and take them away after.
"""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import ila
from ila.models.layer import PEFT, MaskedLoraLinear
from ila.search import stage2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    return ila.attach(base, lora, autocast_adapter_dtype=False).double()


def partition(model: nn.Module) -> None:
    """Empty every parameter but during the forward of the module that holds it."""
    for module in model.modules():
        held = {p: p.data for p in module.parameters(recurse=False)}
        if not held:
            continue

        def bring(module, args, held=held):
            for parameter, data in held.items():
                parameter.data = data

        def take(module, args, output, held=held):
            for parameter in held:
                parameter.data = torch.empty(0, dtype=parameter.dtype)

        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
        take(module, None, None)


def test_partitioned_weights_take_the_path_that_runs_their_hooks():
    model, x = make_model(), torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    partition(model)
    layers = [m for m in model.modules() if isinstance(m, MaskedLoraLinear)]
    assert all(layer.lora_A["default"].weight.numel() == 0 for layer in layers)
    assert [layer.route().path for layer in layers] == [PEFT, PEFT]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    twin = make_model()
    for each in (model, twin):
        names = [n for n, m in each.named_modules() if isinstance(m, MaskedLoraLinear)]
        mask = ila.LayerMask(
            dict.fromkeys(names, 0.0), dict(zip(names, (True, False), strict=True))
        )
        ila.apply_mask(each, mask)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


def test_partitioned_weights_cannot_be_scored_and_the_error_says_why():
    model = make_model()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MaskedLoraLinear)}
    with stage2.scored(model, layers, "default", 2.0):
        partition(model)
        with pytest.raises(RuntimeError, match=r"being scored.*has hooks"):
            model(torch.randn(3, 6, dtype=torch.float64))


def test_weights_taken_away_without_a_hook_are_named():
    model = make_model()
    weight = next(m for m in model.modules() if isinstance(m, MaskedLoraLinear)).weight
    weight.data = torch.empty(0, dtype=weight.dtype)
    with pytest.raises(ValueError, match=r"weight must have shape \(N, 6\)"):
        model(torch.randn(3, 6, dtype=torch.float64))

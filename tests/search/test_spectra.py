"""Scores from the singular values of W: against numpy, PEFT's own function and packed weights."""

import numpy as np
import pytest
import torch
from peft import find_kappa_target_modules
from torch import nn

from ila.masks.mask import LayerMask
from ila.masks.rules import bare, kind_of
from ila.models.edit import masked_layers
from ila.search.spectra import (
    SPECTRA,
    by_weights,
    condition_number,
    signal_to_noise,
    whole_weight,
)


def singular(weight):
    return np.linalg.svd(weight.double().numpy(), compute_uv=False)


def exact_snr(weight):
    """Spectrum's ratio and its noise, which counts as 1 where nothing is at or below the edge."""
    values = singular(weight)
    low, high = np.quantile(values, [0.25, 0.75])
    beta = min(weight.shape) / max(weight.shape)
    edge = (high - low) / 1.349 * np.sqrt((1 + np.sqrt(beta)) ** 2)
    noise = values[values <= edge].sum() or 1.0
    return values[values > edge].sum() / noise / values[0], noise


def exact_kappa(weight):
    values = singular(weight)
    return values[0] / (values[-1] + 1e-8)


def spiked(rows, columns):
    """Noise with three directions above it."""
    noise = torch.randn(rows, columns)
    return noise + 20 * torch.randn(rows, 3) @ torch.randn(3, columns) / columns**0.5


SHAPES = [(40, 24), (24, 40), (37, 37), (1, 9), (9, 1), (2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_both_ratios_are_those_of_numpy(shape, dtype):
    """An SVD in float32 moves a singular value by at most about max(N, K) · eps · σ₁."""
    weight = spiked(*shape).to(dtype)
    values = singular(weight)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    moved = max(shape) * eps * values[0]
    kappa = exact_kappa(weight)
    assert condition_number(weight) == pytest.approx(kappa, rel=2 * moved / values[-1] + 2 * eps)
    snr, noise = exact_snr(weight)
    rel = 4 * min(shape) * moved / min(noise, values[0])
    assert signal_to_noise(weight) == pytest.approx(snr, rel=rel)


def test_the_edge_parts_signal_from_noise():
    """Of 9, 3, 2 and 1 the quartiles are 1.75 and 4.5: the edge is 2 · 2.75 / 1.349 = 4.08."""
    weight = torch.diag(torch.tensor([9.0, 3.0, 2.0, 1.0]))
    assert signal_to_noise(weight) == pytest.approx(9 / (3 + 2 + 1) / 9)
    assert condition_number(weight) == pytest.approx(9 / (1 + 1e-8))
    assert signal_to_noise(torch.eye(5)) == pytest.approx(5.0)  # no spread, so no noise
    assert signal_to_noise(torch.zeros(4, 3)) == 0.0


def test_kappa_ranks_as_peft_does(make_llama):
    model = make_llama()
    scores = by_weights(masked_layers(model, "default"), "kappa")
    mine = [bare(name) for name in sorted(scores, key=scores.get, reverse=True)]
    theirs = find_kappa_target_modules(model.unload(), top_p=1.0, show_progress=False)
    assert [name for name in theirs["target_modules"] if name in mine] == mine
    assert len(mine) == len(scores) > 4


def test_snr_keeps_the_share_of_every_kind_that_spectrum_keeps(make_llama):
    layers = masked_layers(make_llama(), "default")
    ratios = by_weights(layers, "snr_overall")
    for name, layer in layers.items():
        exact, _ = exact_snr(layer.get_base_layer().weight.detach())
        assert ratios[name] == pytest.approx(exact, rel=1e-4)
    kept = set(LayerMask(by_weights(layers, "snr")).top(0.5).open)
    kinds = {kind_of(name) for name in layers}
    best = set()
    for kind in kinds:
        ranked = sorted((n for n in layers if kind_of(n) == kind), key=ratios.get, reverse=True)
        best |= set(ranked[: int(len(ranked) * 0.5)])
    assert kept == best and len(kinds) > 1


@pytest.mark.parametrize("method", SPECTRA)
def test_a_search_scores_by_weights_alone(method, make_llama, rows, search):
    model = make_llama()
    expected = by_weights(masked_layers(model, "default"), method)
    mask = search(model, rows, method=method)
    assert dict(mask.scores) == expected and mask.provenance["cost"]["scores"]["steps"] == 0


@pytest.mark.parametrize("method", SPECTRA)
def test_bf16_weights_are_scored_in_float32(method, make_llama):
    coarse = make_llama().bfloat16()
    fine = make_llama()
    layers = masked_layers(fine, "default")
    with torch.no_grad():
        for name, layer in masked_layers(coarse, "default").items():
            layers[name].get_base_layer().weight.copy_(layer.get_base_layer().weight)
    assert by_weights(masked_layers(coarse, "default"), method) == by_weights(layers, method)


def test_a_packed_weight_is_scored_by_what_it_stands_for():
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig

    import ila

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower = bnb.nn.Linear4bit(
                64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )

        def forward(self, x):
            return self.lower(x)

    model = Model().to("cpu")
    state = model.lower.weight.quant_state
    dense = bnb.functional.dequantize_4bit(model.lower.weight.data, state).float()
    layers = masked_layers(ila.attach(model, LoraConfig(target_modules=["lower"])), "default")
    (layer,) = layers.values()
    assert torch.equal(whole_weight(layer), dense) and dense.shape == (128, 64)
    (score,) = by_weights(layers, "snr_overall").values()
    assert score == signal_to_noise(dense)


def test_a_wrong_method_or_weight_is_refused(make_llama):
    layers = masked_layers(make_llama(), "default")
    with pytest.raises(ValueError, match=r"method must be one of \('snr',"):
        by_weights(layers, "path")
    name, layer = list(layers.items())[2]
    with torch.no_grad():
        layer.get_base_layer().weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"the weight of {name} must be finite"):
        by_weights(layers, "snr")

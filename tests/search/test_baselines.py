"""Each baseline against its formula, computed plainly in fp64."""

import math

import pytest
import torch

from ila.data.encoding import Collator
from ila.models.edit import masked_layers
from ila.models.open_weights import open_layers
from ila.search.baselines import BASELINES, POSITIONS, UNTRAINED, TokenMean, by_position
from ila.search.learn import SearchConfig, learn_mask

STEPS = {"stage1_steps": 3, "stage2_steps": 2, "batch_size": 4, "learning_rate": 2e-2}


@pytest.fixture
def rows(rows):
    """Rows of two lengths, so that there is padding."""
    return [
        {key: values[: len(values) - 3 * (at % 2)] for key, values in row.items()}
        for at, row in enumerate(rows)
    ]


def inputs_and_outputs(model, batch):
    """Module name -> (x, y) of every layer, one row a token."""
    seen, layers = {}, masked_layers(model, "default")
    handles = [
        layer.register_forward_hook(
            lambda m, args, y, name=name: seen.update(
                {name: (args[0].flatten(0, -2).double(), y.flatten(0, -2).double())}
            )
        )
        for name, layer in layers.items()
    ]
    model.eval()
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def update(layer):
    b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    return layer.scaling["default"] * b @ a


def test_update_norm_is_that_of_the_whole_update(make_llama, rows, search):
    model = make_llama()
    mask = search(model, rows, method="update_norm", **STEPS)
    for name, layer in masked_layers(model, "default").items():
        assert mask.scores[name] == pytest.approx(update(layer).norm().item(), rel=1e-9)


def test_output_norm_is_the_mean_square_of_what_the_update_adds(make_llama, rows, search):
    model = make_llama().double()
    settings = STEPS | {"stage2_steps": 1, "batch_size": len(rows)}
    mask = search(model, rows, method="output_norm", **settings)
    batch = Collator(0)(rows)
    kept = batch["attention_mask"].bool().flatten()
    assert not kept.all()  # padding is in the batch, and must not be in the mean
    seen = inputs_and_outputs(model, batch)
    for name, layer in masked_layers(model, "default").items():
        added = seen[name][0][kept] @ update(layer).t()
        exact = added.square().sum(-1).mean().item()
        assert mask.scores[name] == pytest.approx(exact, rel=1e-9), name


def test_feature_norm_compares_a_weight_with_a_random_one(make_llama, rows, search):
    model = make_llama().double()
    settings = STEPS | {"stage2_steps": 1, "batch_size": len(rows)}
    mask = search(model, rows, method="feature_norm", **settings)
    batch = Collator(0)(rows)
    kept = batch["attention_mask"].bool().flatten()
    seen = inputs_and_outputs(model, batch)
    for name, layer in masked_layers(model, "default").items():
        x, w = seen[name][0][kept], layer.get_base_layer().weight.double()
        ratio = (x @ w.t()).square().sum(-1) / x.square().sum(-1)
        exact = -w.shape[1] * ratio.mean().item() / w.square().sum().item()
        assert mask.scores[name] == pytest.approx(exact, rel=1e-9), name


def test_a_token_whose_x_is_zero_adds_nothing(make_llama):
    model = make_llama().double()
    name, layer = next(iter(masked_layers(model, "default").items()))
    seen = TokenMean({name: layer}, "default", "feature_norm")
    seen.begin(torch.ones(1, 2, dtype=torch.long), 0)
    with torch.no_grad(), seen.listening():
        layer(torch.zeros(1, 2, layer.in_features, dtype=torch.float64))
    assert seen.totals.sum() == 0 and seen.tokens.sum() == 2


def test_without_an_attention_mask_every_token_counts(make_llama, rows):
    pairs = [row for row in rows if len(row["labels"]) == len(rows[0]["labels"])]  # no padding
    config = SearchConfig(**STEPS | {"method": "feature_norm", "batch_size": 2})

    def bare(batch):
        return {k: v for k, v in Collator(0)(batch).items() if k != "attention_mask"}

    found = [
        learn_mask(make_llama(), pairs, config, collator=collator, progress=False).scores
        for collator in (Collator(0), bare)
    ]
    assert found[0] == found[1]


def test_gradient_norm_is_exact_where_a_is_orthogonal(make_llama, rows, search):
    """With R = K and A Aᵀ = c I the sketch ‖∇W Aᵀ‖ √K / ‖A‖ is ‖∇W‖ itself."""
    model = make_llama(r=8, lora_dropout=0.0).double()
    layers = masked_layers(model, "default")
    for layer in layers.values():
        a = layer.lora_A["default"].weight
        width = a.shape[1]
        square = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
        layer.lora_A["default"].weight = torch.nn.Parameter(0.3 * square)
        b = torch.zeros(layer.lora_B["default"].weight.shape[0], width, dtype=torch.float64)
        layer.lora_B["default"].weight = torch.nn.Parameter(b)
    settings = STEPS | {"stage2_steps": 1, "batch_size": len(rows)}
    mask = search(model, rows, method="gradient_norm", **settings)
    weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers.values()]
    grads = torch.autograd.grad(model.train()(**Collator(0)(rows)).loss, weights)
    for name, w, grad in zip(layers, weights, grads, strict=True):
        exact = (grad.norm() / w.norm()).item()
        assert mask.scores[name] == pytest.approx(exact, rel=1e-6), name


def test_the_sketch_of_a_gradient_is_right_on_average():
    torch.manual_seed(0)
    gradient, width, rank = torch.randn(20, 64).double(), 64, 8
    sketches = []
    for _ in range(400):
        a = torch.empty(rank, width, dtype=torch.float64).uniform_(-1, 1)
        sketches.append((gradient @ a.t()).square().sum() * width / a.square().sum())
    found = torch.stack(sketches)
    error = found.std() / math.sqrt(len(sketches))
    assert abs(found.mean() - gradient.square().sum()) < 4 * error


@pytest.mark.parametrize("method", BASELINES)
def test_a_seed_decides_every_bit_and_the_model_is_left_as_it_was(method, make_llama, rows, search):
    scores = []
    for _ in range(2):
        model = make_llama()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        mask = search(model, rows, method=method, **STEPS)
        scores.append(dict(mask.scores))
        assert all(math.isfinite(score) for score in mask.scores.values())
        assert not any(layer._forward_hooks for layer in masked_layers(model, "default").values())
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert bool(changed) == (method not in UNTRAINED) and all(".lora_" in n for n in changed)
    assert scores[0] == scores[1]
    assert mask.provenance["stage1"]["steps"] == (0 if method in UNTRAINED else 3)


def test_positions():
    names = list("abcdef")
    ranked = {
        method: sorted(names, key=by_position(names, method, seed=0).get, reverse=True)
        for method in POSITIONS
    }
    assert ranked["last"] == names[::-1] and ranked["first"] == names
    assert set(ranked["middle"][:2]) == {"c", "d"} and set(ranked["middle"][-2:]) == {"a", "f"}
    seeds = {tuple(by_position(names, "random", seed).values()) for seed in range(20)}
    assert len(seeds) > 10 and len({tuple(sorted(scores)) for scores in seeds}) == 1
    with pytest.raises(ValueError, match="method"):
        by_position(names, "path", 0)


def test_feature_norm_refuses_a_trained_adapter(make_llama, rows, search):
    model = make_llama()
    search(model, rows, method="update_norm", **STEPS)
    with pytest.raises(ValueError, match="adapter is trained already"):
        search(model, rows, method="feature_norm", **STEPS)


def test_norms_of_adapters_are_refused_where_weights_are_trained(make_llama, rows, search):
    with pytest.raises(ValueError, match="method must be one of"):
        search(open_layers(make_llama()), rows, method="update_norm", **STEPS)

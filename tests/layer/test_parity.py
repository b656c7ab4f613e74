"""With all gates open, training is PEFT's; with a score, it is the formula with γ = σ(s)."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import ila

TEXT = (
    "Once upon a time there was a small fox who wanted to cross the river. He asked the old bear, "
    "and the bear said that the water was too cold, so they built a bridge of stones together. ",
    "Lily had a red ball. One day it rolled under the house. It was dark, and she was afraid. "
    "Her brother took a lamp and went with her, and there was the ball beside a sleeping cat. ",
)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def stories(folder, family: str, dtype: torch.dtype) -> nn.Module:
    """The trained weights, in either family: their layers have the same names and shapes."""
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    if family == "llama":
        return with_norms_in_its_dtype(llama)
    names = MistralConfig().to_dict().keys() & llama.config.to_dict().keys()
    names -= {"model_type", "architectures", "transformers_version"}
    config = MistralConfig(**{name: getattr(llama.config, name) for name in names})
    mistral = MistralForCausalLM(config).to(dtype)
    mistral.load_state_dict(llama.state_dict())
    return with_norms_in_its_dtype(mistral)


def with_norms_in_its_dtype(model: nn.Module) -> nn.Module:
    """Replace the norms of transformers: they round to fp32, and fp64 would show nothing below."""
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__ in ("LlamaRMSNorm", "MistralRMSNorm"):
                own = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=model.dtype)
                own.load_state_dict(norm.state_dict())
                setattr(module, name, own)
    return model


def stories_tokens(folder) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text).input_ids[:64] for text in TEXT]
    assert all(len(row) == 64 for row in rows)
    return torch.tensor(rows)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The usual loss, in the dtype of the model: that of transformers rounds logits to fp32."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def losses_of(model: nn.Module, batches: list[Tensor]) -> list[float]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    losses = []
    for ids in batches:
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_training(plain, ours, batches, dtype) -> None:
    assert set(ila.explain(ours).paths()) == {"eager"}
    expected = losses_of(plain, batches)
    actual = losses_of(ours, batches)
    assert len(expected) == 20
    assert actual == pytest.approx(expected, rel=TOLERANCES[dtype], abs=0)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_twenty_steps_of_training_are_those_of_peft(pair, tiny, family, dtype):
    changes = {"lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": True}
    plain, ours = pair(tiny.config(**changes), family=family, dtype=dtype)
    batches = [torch.randint(64, (4, 24)) for _ in range(4)] * 5
    assert_same_training(plain, ours, batches, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_trained_model_reads_text_as_with_peft(tiny, stories260k, family, dtype):
    config = tiny.config(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=True)
    plain = tiny.plain(config, stories(stories260k, family, dtype))
    ours = tiny.attached(config, stories(stories260k, family, dtype))
    batches = [stories_tokens(stories260k)] * 20
    with torch.no_grad():
        assert loss_of(plain, batches[0]) < 0.75 * math.log(512)  # it knows the language
    assert_same_training(plain, ours, batches, dtype)


def relative_errors(tiny, models, exact, batches) -> list[dict[str, float]]:
    """For each model, ‖result − exact‖ of every tensor, over all batches."""
    squares = [{} for _ in models]
    for ids in batches:
        truth = tiny.run(exact, input_ids=ids)
        for model, sums in zip(models, squares, strict=True):
            result = tiny.run(model, input_ids=ids)
            assert set(result) == set(truth)
            for name, tensor in result.items():
                error = (tensor.double() - truth[name]).square().sum().item()
                sums[name] = sums.get(name, 0.0) + error
    return [{name: math.sqrt(value) for name, value in sums.items()} for sums in squares]


@pytest.mark.parametrize("rows", [2, 16], ids=["short", "long"])  # 18 and 144 tokens
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bf16_with_fp32_adapters_is_at_most_twice_as_far_off_as_peft(tiny, family, rows):
    config = tiny.config(target_modules="all-linear", r=8, lora_alpha=16)
    bf16 = {"family": family, "dtype": torch.bfloat16, "hidden_size": 64, "intermediate_size": 112}
    plain = tiny.plain(config, tiny.base(**bf16))
    ours = tiny.attached(config, tiny.base(**bf16))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    exact = copy.deepcopy(plain).double()
    batches = [torch.randint(64, (rows, 9)) for _ in range(4)]
    theirs, mine = relative_errors(tiny, (plain, ours), exact, batches)
    assert len(theirs) == 1 + 2 * 14
    ratios = {name: mine[name] / theirs[name] for name in theirs}
    assert max(ratios.values()) < 2, sorted(ratios.items(), key=lambda item: -item[1])[:5]


# --- a gate that is a tensor


def scored_layer(tiny, score: float, trainable: bool):
    model = tiny.attached(tiny.config(lora_alpha=6, r=4))
    layer = next(iter(tiny.layers(model).values()))
    layer.lora_S["default"] = nn.Parameter(torch.tensor([score], dtype=torch.float64))
    for part in (layer.lora_A, layer.lora_B):
        part.requires_grad_(trainable)
    return layer


def results(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = torch.arange(y.numel(), dtype=y.dtype).cos().view_as(y)
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("trainable", [True, False], ids=["training", "search"])
@pytest.mark.parametrize("score", [-1000.0, -1.3, 0.0, 4.0, 40.0])
def test_score_gates_the_update_by_its_sigmoid(tiny, score, trainable):
    layer = scored_layer(tiny, score, trainable)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    s, w = layer.lora_S["default"], layer.base_layer.weight
    x = torch.randn(5, 3, 32, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, "A": a, "B": b, "s": s}
    actual = results(layer(x), leaves)
    expected = results(F.linear(x, w) + torch.sigmoid(s) * 1.5 * (x @ a.t() @ b.t()), leaves)
    tiny.assert_close(actual, expected)
    assert set(actual) == {"y", "x", "s"} | ({"A", "B"} if trainable else set())
    if score == -1000.0:
        assert torch.equal(actual["y"], F.linear(x, w))
        assert actual["s"] == 0
    else:
        gate = torch.sigmoid(s.detach())
        dy = torch.arange(actual["y"].numel(), dtype=torch.float64).cos().view_as(actual["y"])
        by_hand = 1.5 * ((dy @ b) * (x @ a.t())).sum() * gate * (1 - gate)
        assert torch.allclose(actual["s"], by_hand, rtol=1e-11, atol=1e-15)
        if trainable:
            assert torch.allclose((actual["B"] * b).sum() * (1 - gate), actual["s"], rtol=1e-9)


def test_scores_of_a_model_follow_finite_differences(tiny):
    model = tiny.attached(tiny.config())
    layers = tiny.layers(model)
    for layer in layers.values():
        layer.lora_S["default"] = nn.Parameter(torch.full((1,), 0.4, dtype=torch.float64))
    model.requires_grad_(False)
    scores = {name: layer.lora_S["default"].requires_grad_() for name, layer in layers.items()}

    loss = loss_of(model, tiny.tokens())
    grads = dict(zip(scores, torch.autograd.grad(loss, list(scores.values())), strict=True))
    # The norms of these families compute in fp32: a slope is off by 1e-7 / step from rounding, and
    # by step² from curvature.
    step = 1e-2
    for name, score in scores.items():
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                score.add_(sign * step)
                values.append(loss_of(model, tiny.tokens()))
                score.sub_(sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        assert grads[name].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-4)
    assert len({grad.item() for grad in grads.values()}) == 12


def test_a_scored_layer_does_not_ignore_its_score(tiny):
    layer = scored_layer(tiny, 0.5, True)
    x = torch.randn(2, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"must take the fused path.*extra forward arguments"):
        layer(x, adapter_names=["default", "__base__"])
    layer.merge()
    with pytest.raises(RuntimeError, match=r"must take the fused path.*merged"):
        layer(x)
    layer.unmerge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert layer.lora_S["default"].requires_grad
    assert not torch.equal(layer(x), layer.base_layer(x))

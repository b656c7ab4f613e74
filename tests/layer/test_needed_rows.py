"""MLPs compute the rows that the loss depends on: the same loss and gradients from fewer rows."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ila
from ila.models import mlp as lean_mlp
from ila.models.needed_rows import MOST, NeededRows

IGNORED = -100
ALL = {"target_modules": "all-linear"}
# Tokens of each row of (3, 7), and the first of them that is an answer.
LENGTHS, ANSWERS = (7, 4, 3), (5, 2, 1)


def padded(tiny, side: str = "right", **changes) -> dict[str, Tensor]:
    ids, place = tiny.tokens(), torch.arange(7)
    lengths, answers = torch.tensor([LENGTHS, ANSWERS]).unsqueeze(-1)
    if side == "left":
        place = place - (7 - lengths)
    real = (place >= 0) & (place < lengths)
    labels = ids.masked_fill(~real | (place < answers), IGNORED)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels} | changes


def results(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of the losses, computed before any backward, and its gradients."""
    model.zero_grad(set_to_none=True)
    loss = sum(model(**batch).loss for batch in batches)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def of_every_row(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of a copy: transformers leaves hooks in a model whose hidden states were read."""
    return results(copy.deepcopy(model), batch | {"output_hidden_states": True})


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    """The rows that each call of a lean MLP computes."""
    seen, lean = [], lean_mlp._lean

    def counted(block: nn.Module, x: Tensor, activation: str) -> Tensor:
        seen.append(x.shape[:-1].numel())
        return lean(block, x, activation)

    monkeypatch.setattr(lean_mlp, "_lean", counted)
    return seen


def made(tiny, **changes) -> nn.Module:
    model = tiny.attached(tiny.config(**ALL), tiny.base(**changes)).train()
    ila.lean_head(model)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_and_every_gradient_are_pefts(tiny, rows, family, side, masked):
    plain, model = (
        tiny.plain(tiny.config(**ALL), tiny.base(family=family)),
        made(tiny, family=family),
    )
    if masked:
        mask = tiny.mask(model, lambda i, name: "layers.0" in name or i % 2)
        for closing in (ila.convert(plain), model):
            ila.apply_mask(closing if closing is model else plain, mask)
    batch = padded(tiny, side)
    expected = of_every_row(model, batch)
    # transformers computes this loss in fp32.
    tiny.assert_close({n: t.double() for n, t in results(plain, batch).items() if n in expected},
                      expected, 1e-6)  # fmt: skip
    rows.clear()
    tiny.assert_close(results(model, batch), expected, 1e-12)
    answers = sum(n - first for n, first in zip(LENGTHS, ANSWERS, strict=True))
    assert rows == [sum(LENGTHS)] * (len(rows) - 1) + [answers] and len(rows) > 1


def test_without_padding_the_last_block_alone_leaves_rows_out(tiny, rows):
    model, batch = made(tiny), padded(tiny)
    for changes in ({"attention_mask": None}, {"attention_mask": torch.ones(3, 7).long()}):
        expected = of_every_row(model, batch | changes)
        rows.clear()
        tiny.assert_close(results(model, batch | changes), expected, 1e-12)
        assert rows == [21] * (len(rows) - 1) + [6]


def test_a_label_at_padding_is_computed(tiny, rows):
    batch = padded(tiny)
    batch["labels"][2, 5] = 1  # position 4 of a row of 3 tokens predicts it
    model = made(tiny)
    expected = of_every_row(model, batch)
    rows.clear()
    tiny.assert_close(results(model, batch), expected, 1e-12)
    assert rows[0] == sum(LENGTHS) + 1 and rows[-1] == 7


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_the_same_rows_again(tiny, rows, reentrant):
    """Two batches of different rows run before either is recomputed."""
    model = made(tiny)
    batches = padded(tiny), padded(tiny, "left", attention_mask=None), padded(tiny, "left")
    expected = results(model, *batches)
    ila.gradient_checkpointing(model, use_reentrant=reentrant)
    rows.clear()
    tiny.assert_close(results(model, *batches), expected, 1e-12)
    half = len(rows) // 2
    assert sorted(rows[:half]) == sorted(rows[half:]) and len(set(rows)) > 2


def test_a_checkpoint_of_other_code_recomputes_all_rows_or_says_so(tiny):
    model = made(tiny)
    expected = results(model, padded(tiny))
    for block in model.get_base_model().model.layers:
        forward = block.forward

        def again(*args, forward=forward, **kwargs):
            return checkpoint(lambda *a: forward(*a, **kwargs), *args, use_reentrant=True)

        block.forward = again
    model.enable_input_require_grads()
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    tiny.assert_close(results(model, padded(tiny)), expected, 1e-11)


def test_whoever_reads_hidden_states_gets_all_rows(tiny, rows):
    model = made(tiny)
    for asked in ("output_hidden_states", "output_attentions"):
        rows.clear()
        model(**padded(tiny), **{asked: True})
        assert set(rows) == {21}
    model.config.output_hidden_states = True
    rows.clear()
    model(**padded(tiny))
    assert set(rows) == {21}


def test_a_hook_sees_all_that_its_module_may_be_asked_for(tiny, rows):
    model, seen = made(tiny), []
    layers = model.get_base_model().model.layers
    hooks = [
        layers[0].mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(y.shape)),
        layers[-1].register_forward_hook(lambda m, x, y: None),
    ]
    expected = results(model, padded(tiny))
    assert seen == [(3, 7, layers[0].mlp.up_proj.out_features)]
    # All rows in the first block; in the last one, whose output is seen, all tokens.
    assert rows[0] == 21 and rows[-1] == sum(LENGTHS)
    for hook in hooks:
        hook.remove()
    rows.clear()
    tiny.assert_close(results(model, padded(tiny)), expected, 1e-12)
    assert rows[0] == sum(LENGTHS) and rows[-1] == 6


def test_calls_without_labels_and_other_models_compute_all_rows(tiny, rows):
    model = made(tiny)
    batch = padded(tiny)
    model(**batch)
    rows.clear()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ila.restore(model)
    model = tiny.attached(tiny.config(**ALL))
    model(**batch)
    assert rows and set(rows) == {21}


@pytest.mark.parametrize("real", [0.5, MOST, 1.0])
def test_rows_are_left_out_where_that_pays(real):
    mask = (torch.arange(100) < round(real * 100)).view(4, 25)
    found = NeededRows.of(mask.long(), torch.full((100,), IGNORED), None)
    kept = mask.view(-1).nonzero().squeeze(1)
    assert found.tokens is None if real == 1.0 else torch.equal(found.tokens, kept)
    assert found.answers is None


@pytest.mark.parametrize("mask", [None, torch.ones(4, 1, 5, 5), torch.zeros(4, 9)])
def test_a_mask_of_another_shape_says_nothing_of_padding(mask):
    targets = torch.full((20,), IGNORED)
    targets[3] = 1
    mlp, x = nn.Linear(2, 2), torch.zeros(4, 5, 2)
    found = NeededRows.of(mask, targets, mlp)
    assert found.of_mlp(nn.Linear(2, 2), x) is None
    assert found.of_mlp(mlp, x).tolist() == [3]
    assert found.of_mlp(mlp, x[:2]) is None  # not the rows of this batch

"""The rivals with a fused loss, and the batches where every token is a label."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.model.contestants import fill_adapters, lora
from benchmarks.model.material import Material, evenly, join
from benchmarks.peers import fused_loss
from benchmarks.peers.fused_loss import LIGER_LOSS, LOSSES, TORCH_LOSS, fuse, why_not


def tiny_peft() -> torch.nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip
    made = get_peft_model(base, lora(2))
    fill_adapters(made)
    return made


@pytest.mark.skipif(why_not(TORCH_LOSS) is not None, reason="this torch has no fused loss")
@pytest.mark.parametrize("padded", [False, True])
def test_a_fused_loss_is_that_of_peft(padded):
    """Labels at answers alone, and rows of two lengths: the loss and every gradient."""
    model, ids = tiny_peft(), torch.arange(24).mul(7).remainder(64).view(2, 12)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :5] = -100
    if padded:
        labels[1, 9:], mask[1, 9:] = -100, 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    exact, found = model(**batch).loss, []
    exact.backward()
    for parameter in model.parameters():
        found.append(parameter.grad)
        parameter.grad = None
    fuse(model, LOSSES[TORCH_LOSS])
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:
            assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()


def test_a_fused_loss_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(LIGER_LOSS) == "its kernels need a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_loss, "find_spec", lambda name: None)
    assert why_not(LIGER_LOSS) == "liger_kernel is not installed"
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert "has no linear_cross_entropy" in why_not(TORCH_LOSS)


def test_joined_rows_are_all_labels():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]
    apart = Material(rows, 1, 3, torch.device("cpu"))
    joined = Material(join(rows, 2, 4), 1, 4, torch.device("cpu"))
    assert apart.labelled == pytest.approx(1 / 3) and joined.labelled == pytest.approx(3 / 4)
    assert apart.answers == apart.labelled and joined.answers == joined.labelled
    assert joined(1)["labels"].tolist() == joined(1)["input_ids"].tolist() == [[2, 3, 1, 2]]


def test_rows_come_as_they_are_and_padding_counts_among_the_positions():
    rows = [{"input_ids": [0] * n, "labels": [-100] * (n - 2) + [0, 0]} for n in (2, 8, 4, 3, 6)]
    some = Material(evenly(rows, 2), 2, 8, torch.device("cpu"))
    assert [len(row["input_ids"]) for row in some.rows] == [2, 4]
    assert some(0)["input_ids"].shape == (2, 8) and some.tokens == 6
    assert some.labelled == pytest.approx(3 / 6) and some.answers == pytest.approx(3 / 16)

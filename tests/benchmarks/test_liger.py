"""Liger beside the other contestants: what it changes of transformers holds for its own steps."""

import sys
from types import ModuleType

import pytest
import torch
from transformers.models.llama import modeling_llama

from benchmarks.gpu import models
from benchmarks.model.cell import kernels_of
from benchmarks.model.contestants import LIGER, Spec, build, mask_of
from benchmarks.peers import liger


def rope(q, k, cos, sin, *_, **__):
    """Liger's, in the place of transformers'."""
    return plain(q, k, cos, sin)


plain = modeling_llama.apply_rotary_pos_emb


@pytest.fixture
def installed(monkeypatch):
    """A package of Liger's shape: it changes a model and the module that the family shares."""

    def apply(model):
        modeling_llama.apply_rotary_pos_emb = rope
        model.model.norm.forward = model.model.norm.forward

    package = ModuleType("liger_kernel.transformers")
    package.apply_liger_kernel_to_llama = apply
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(liger, "_REPLACED", {})


def tiny():
    config = models.CONFIGS["Llama-3-8B"].to_dict() | {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    kind = type(models.CONFIGS["Llama-3-8B"])
    return models.random_model("tiny", kind.from_dict(config), 2, torch.device("cpu"))


def test_what_the_family_shares_is_changed_for_its_own_steps_only(installed):
    base = tiny()
    mask = mask_of(["a"], 1.0, "all")
    model = build(Spec(LIGER), base, mask, rank=2)
    assert "forward" in vars(model.base_model.model.model.norm)
    assert "forward" not in vars(base.model.norm)
    assert modeling_llama.apply_rotary_pos_emb is plain
    with kernels_of(Spec(LIGER)):
        assert modeling_llama.apply_rotary_pos_emb is rope
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert modeling_llama.apply_rotary_pos_emb is plain
    with kernels_of(Spec("PEFT")):
        assert modeling_llama.apply_rotary_pos_emb is plain


def test_it_is_undone_by_an_error_too(installed):
    liger.change(tiny())
    with pytest.raises(RuntimeError, match="out of memory"), liger.in_force():
        raise RuntimeError("out of memory")
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_without_a_gpu_it_is_no_contestant(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not liger.is_available()
    assert LIGER not in [spec.kind for spec in models.specs(torch.device("cpu"))]

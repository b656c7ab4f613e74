"""Layers that a mask closes with ``closed="keep"``: frozen in place, computed, saved, free."""

import copy

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import ila
from ila.models.blocks import frozen_blocks
from ila.prefix.frozen_prefix import Prefix

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def first_block(position, name):
    return "layers.0." in name


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def train(model, ids, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("closed", [first_block, lambda i, name: i % 3 > 0])
def test_open_layers_get_the_gradients_they_have_when_all_are_open(pair, tiny, closed):
    plain, ours = pair()
    expected = tiny.run(plain)
    mask = tiny.mask(ours, closed)
    ila.apply_mask(ours, mask, closed="keep")
    found = tiny.run(ours)
    kept = {n for n in expected if n.split(".lora_")[0] in mask.closed}
    assert kept and not kept & set(found)
    tiny.assert_close(found, {n: t for n, t in expected.items() if n not in kept})


def test_a_kept_layer_saves_neither_its_input_nor_its_thin_product(tiny):
    model = tiny.attached(tiny.config())
    layer = model.get_submodule(Q0)
    for rows in (3, 100):  # torch's own autograd, and ours
        x = torch.randn(rows, 32, dtype=torch.float64, requires_grad=True)
        ila.apply_mask(model, tiny.mask(model, lambda i, name: name == Q0), closed="keep")
        saved: list[torch.Tensor] = []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        constants = {p.data_ptr() for p in layer.parameters()}
        assert saved and {t.untyped_storage().data_ptr() for t in saved} <= constants
        row = next(row for row in ila.explain(model, rows) if row.module == Q0)
        assert not row.open and row.saved_bytes == 0 and row.why.startswith("kept by a mask")
        ila.apply_mask(model, tiny.mask(model, lambda i, name: False))


def test_what_lies_below_the_lowest_open_layer_is_a_frozen_prefix(tiny):
    model = tiny.attached(tiny.config(target_modules="all-linear"))
    mask = tiny.mask(model, first_block)
    ila.apply_mask(model, mask, closed="keep")
    assert frozen_blocks(model) == 1
    assert ila.gradient_checkpointing(model) == 1
    seen = []
    model.get_submodule("base_model.model.model.layers.0").register_forward_hook(
        lambda module, args, out: seen.append(out.requires_grad)
    )
    model.train()
    model(tiny.tokens()).logits.sum().backward()
    assert seen == [False]
    assert [row.module for row in ila.explain(model) if row.in_prefix] == list(mask.closed)


def test_every_adapter_is_saved_and_plain_peft_computes_and_merges_the_same(tiny, tmp_path):
    ids = tiny.tokens()
    model = tiny.attached(tiny.config(lora_dropout=0.2))
    train(model, ids)
    before = adapters(model)
    mask = tiny.mask(model, first_block)
    report = ila.apply_mask(model, mask, closed="keep")
    assert report.closing == "keep" and report.closed == mask.closed
    train(model, ids)
    after = adapters(model)
    changed = {n.split(".lora_")[0] for n in after if not torch.equal(after[n], before[n])}
    assert changed == set(mask.open)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny.base(), str(tmp_path))
    tiny.assert_equal(adapters(plain), after)
    model.eval()
    plain.eval()
    ours, theirs = model(ids).logits, plain(ids).logits
    tiny.assert_close({"logits": ours}, {"logits": theirs})
    merged, expected = (copy.deepcopy(m).merge_and_unload() for m in (model, plain))
    tiny.assert_equal(tiny.state_of(merged), tiny.state_of(expected))


def test_a_kept_update_is_a_constant_without_dropout(tiny):
    model = tiny.attached(tiny.config(lora_dropout=0.5)).train()
    layer = model.get_submodule(Q0)
    x = torch.randn(5, 32, dtype=torch.float64)
    ila.apply_mask(model, tiny.mask(model, lambda i, name: name == Q0), closed="keep")
    y = layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = F.linear(x, layer.weight) + layer.scaling["default"] * (x @ a.t() @ b.t())
    torch.testing.assert_close(y, expected)
    # So that a prefix of kept layers can be cached although the adapter has dropout.
    ila.apply_mask(model, tiny.mask(model, first_block), closed="keep")
    assert Prefix.of(model, torch.no_grad).depth == 1
    layer.lora_dropout["default"].register_forward_hook(lambda *_: None)  # PEFT's code now
    with pytest.raises(ValueError, match=r"dropout 0\.5 is active in the frozen prefix"):
        Prefix.of(model, torch.no_grad)


def test_kept_stays_kept_when_peft_sets_adapters_and_dropped_comes_back(tiny):
    model = tiny.attached(tiny.config())
    mask = tiny.mask(model, first_block)

    def trained():
        return {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}

    everything, weights = trained(), adapters(model)
    ila.apply_mask(model, mask, closed="keep")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert trained() == set(mask.open)
    ila.apply_mask(model, mask, closed="drop")
    assert {n.split(".lora_")[0] for n in adapters(model)} == set(mask.open)
    assert model.peft_config["default"].target_modules != "all-linear"
    ila.apply_mask(model, mask, closed="keep")
    tiny.assert_equal(adapters(model), weights)
    assert trained() == set(mask.open)
    ila.apply_mask(model, tiny.mask(model, lambda i, name: False))
    assert trained() == everything
    ila.apply_mask(model, mask, closed="keep")
    ila.restore(model)
    assert trained() == everything
    tiny.assert_equal(adapters(model), weights)


def test_the_optimizer_forgets_what_is_kept_and_cannot_open_it_again(tiny):
    model = tiny.attached(tiny.config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(tiny.tokens()).logits.sum().backward()
    optimizer.step()
    ila.apply_mask(model, tiny.mask(model, first_block), closed="keep", optimizer=optimizer)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad} == set(optimizer.state)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with pytest.raises(ValueError, match="does not hold the parameters of 6 layers"):
        ila.apply_mask(model, tiny.mask(model, lambda i, name: False), optimizer=optimizer)


def test_another_word_is_refused_and_an_adapter_that_moved_the_base_may_be_kept(tiny):
    model = tiny.attached(tiny.config(init_lora_weights="olora"), tiny.base(dtype=torch.float32))
    mask = tiny.mask(model, first_block)
    with pytest.raises(ValueError, match=r"closed must be one of \('drop', 'keep'\), got 'freeze'"):
        ila.apply_mask(model, mask, closed="freeze")
    with pytest.raises(ValueError, match="a layer closed now would not be the pretrained layer"):
        ila.apply_mask(model, mask)
    logits = model(tiny.tokens()).logits
    ila.apply_mask(model, mask, closed="keep")
    assert torch.equal(model(tiny.tokens()).logits, logits)

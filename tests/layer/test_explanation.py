"""What `explain` says of prefix and bytes is what autograd does in a forward."""

import pytest
import torch

import ila
from benchmarks.families import models as families
from ila.models import plain_blocks
from ila.models.blocks import find_blocks

LENGTH, ROWS = 30, 3  # more tokens than eager.SHORT_ROWS


def held_by_layers(model, layers):
    """Bytes that autograd holds for each layer, each storage for the first; and x's grad flag."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    bytes_of, flows, seen, inside, keep = dict.fromkeys(layers, 0), {}, set(), [], []

    def pack(tensor):
        keep.append(tensor)  # so that no storage is freed and used again while we count
        at = tensor.untyped_storage().data_ptr()
        if inside and tensor.numel() > 1 and at not in parameters | seen:
            seen.add(at)
            bytes_of[inside[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(name, args):
        inside.append(name)
        keep.append(args[0])
        flows[name] = args[0].requires_grad

    handles = []
    for name, layer in layers.items():
        handles += [
            layer.register_forward_pre_hook(lambda m, args, n=name: enter(n, args)),
            layer.register_forward_hook(lambda *_: inside.pop() and None),
        ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.arange(ROWS * LENGTH).remainder(64).view(ROWS, LENGTH)
        keep.append(model(input_ids=ids, labels=ids).loss)
    # While the hooks are there: one on its down_proj makes a lean block keep h.
    found = ila.explain(model, ROWS * LENGTH)
    for handle in handles:
        handle.remove()
    return bytes_of, flows, found


MASKS = {
    "all": lambda name: True,
    "the last block": lambda name: "layers.2." in name,
    "one gate_proj": lambda name: "layers.1.mlp.gate_proj" in name,
    "one down_proj": lambda name: "layers.1.mlp.down_proj" in name,
    "k_proj and what is above": lambda name: "layers.0.self_attn.k" in name or "layers.2" in name,
    "o_proj": lambda name: "self_attn.o_proj" in name and "layers.0" not in name,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_bytes_and_prefix_are_those_of_autograd(mask, dropout, dtype, tiny):
    config = tiny.config(target_modules="all-linear", lora_dropout=dropout)
    model = tiny.attached(config, tiny.base(dtype=dtype, num_hidden_layers=3)).train()
    ila.apply_mask(model, tiny.mask(model, lambda _, name: not MASKS[mask](name)))
    layers = tiny.layers(model)
    held, flows, found = held_by_layers(model, layers)
    assert {row.module: row.saved_bytes for row in found} == held
    assert {r.module: r.in_prefix for r in found} == {
        name: not flows[name] and not MASKS[mask](name) for name in layers
    }
    assert found.saved_bytes() == sum(held.values()) > 0
    text = str(found)
    assert f"saved for backward at {ROWS * LENGTH} tokens" in text and "total" in text


def test_plain_peft_layers_are_counted_too(tiny):
    """bf16 below fp32 adapters: each layer keeps its own copy of x."""
    config = tiny.config(target_modules="all-linear")
    model = tiny.plain(config, tiny.base(dtype=torch.bfloat16)).train()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for convert in (lambda model: None, ila.convert):
        convert(model)
        held, _, found = held_by_layers(model, layers)
        assert {row.module: row.saved_bytes for row in found} == held


def test_a_lean_block_is_counted_with_what_it_keeps_instead_of_x(tiny):
    config = tiny.config(target_modules="all-linear")
    model = tiny.attached(config, tiny.base(dtype=torch.float64)).train()
    block = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
    x = torch.randn(ROWS, LENGTH, 32, dtype=torch.float64, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    rows = [r for r in ila.explain(model, ROWS * LENGTH) if "layers.0.mlp" in r.module]
    assert sum(row.saved_bytes for row in rows) == sum(kept.values())
    assert y.shape == x.shape


def test_what_is_trained_besides_adapters_moves_the_prefix(tiny):
    config = tiny.config(target_modules="all-linear")
    model = tiny.attached(config, tiny.base(num_hidden_layers=3)).train()
    ila.apply_mask(model, tiny.mask(model, lambda _, name: "layers.2.mlp.down_proj" not in name))
    layers = tiny.layers(model)

    def prefix():
        flows = held_by_layers(model, layers)[1]
        rows = {row.module: row.in_prefix for row in ila.explain(model)}
        trained = {n for n, m in layers.items() if any(p.requires_grad for p in m.parameters())}
        assert rows == {n: not flows[n] and n not in trained for n in layers}
        return sum(rows.values())

    assert prefix() == 20
    decoder, blocks = find_blocks(model)
    weight = next(m for n, m in layers.items() if "layers.1.mlp.gate" in n).base_layer.weight
    weight.requires_grad_()
    assert prefix() == 7 + 4 + 1
    row = {r.module: r for r in ila.explain(model, 10)}
    (gate,) = [r for n, r in row.items() if "layers.1.mlp.gate" in n]
    assert not gate.open and gate.saved_bytes == 10 * 32 * 8
    blocks[0].input_layernorm.weight.requires_grad_()
    assert prefix() == 0
    blocks[0].input_layernorm.weight.requires_grad_(False)
    decoder.embed_tokens.weight.requires_grad_()
    assert prefix() == 0


def test_what_peft_decides_is_not_guessed(tiny):
    model = tiny.attached(tiny.config(use_dora=True))
    assert {row.saved_bytes for row in ila.explain(model)} == {None}
    text = str(ila.explain(model))
    assert "?" in text and "≥ 0.00" in text


def test_tokens_out_of_range_are_refused(tiny):
    with pytest.raises(ValueError, match="tokens must be ≥ 1, got 0"):
        ila.explain(tiny.attached(tiny.config()), 0)


def test_attach_logs_each_kind_of_block_that_computes_layer_by_layer_once(
    tiny, caplog, monkeypatch
):
    monkeypatch.setattr(plain_blocks, "_said", set())
    config = tiny.config(target_modules="all-linear")
    for _ in range(2):
        model = tiny.attached(config, families.build("Phi-3"))
    attention = "3 × Phi3Attention: its layers are o_proj, qkv_proj"
    mlp = "3 × Phi3MLP: its layers are gate_up_proj, down_proj"
    assert caplog.messages == [f"Computed layer by layer: {kind}" for kind in (attention, mlp)]
    found = ila.explain(model)
    assert set(caplog.messages) <= set(found.notes()) and len(found.plain) == 6
    tiny.attached(config)
    assert len(caplog.messages) == 2


def test_explain_says_of_plain_peft_that_its_blocks_are_not_converted(tiny):
    model = tiny.plain(tiny.config(target_modules="all-linear"))
    assert set(ila.explain(model).plain.values()) == {
        f"{kind}: its class is not converted (ila.convert)"
        for kind in ("LlamaAttention", "LlamaMLP")
    }
    ila.convert(model)
    assert ila.explain(model).plain == {}

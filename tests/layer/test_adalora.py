"""AdaLoRA on our layers: PEFT's numbers and schedule, under masks too."""

import json

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import RankAllocator, SVDLinear

import ila
from ila.models.adalora import MaskedSvdLinear, tuner_of

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 30
# PEFT takes a layer that has lost every rank for a shard that was not gathered, and looks for the
# ranks of AdaLoRA among those of LoRA when it loads an adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*invalid shape"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match"),
]


def config_of(**changes):
    options = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": STEPS}
    options |= {"tinit": 4, "tfinal": 6, "deltaT": 2}
    return AdaLoraConfig(**options | {"target_modules": ALL, "task_type": "CAUSAL_LM"} | changes)


def stirred(model):
    """Give E values: at its start of 0 the adapter has no effect."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.normal_()
    return model


def svd_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, MaskedSvdLinear)}


def mask_of(model, closed):
    names = list(svd_layers(model))
    return ila.LayerMask(dict.fromkeys(names, 1.0), {n: not closed(n) for n in names})


def losses_of(model, tiny, steps=STEPS):
    """Train with the schedule of ranks as PEFT's own examples do; return the losses."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = tiny.tokens(rows=4, length=9).roll(step % 7, dims=0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def open_ranks_of(model):
    return {n: int((p != 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_logits_and_gradients_are_pefts(pair, tiny, dropout):
    plain, ours = (stirred(model) for model in pair(config_of(lora_dropout=dropout)))
    assert {layer.route().path for layer in svd_layers(ours).values()} == {"fused"}
    if dropout:
        plain.eval(), ours.eval()
    tiny.assert_close(tiny.run(ours), tiny.run(plain))
    with ours.disable_adapter():
        assert tiny.differs(tiny.run(ours), tiny.run(plain))


def test_thirty_steps_with_the_schedule_have_pefts_losses_in_fp32(tiny):
    plain = tiny.plain(config_of(), tiny.base(dtype=torch.float32))
    ours = tiny.attached(config_of(), tiny.base(dtype=torch.float32))
    expected, found = losses_of(plain, tiny), losses_of(ours, tiny)
    assert expected[-1] < expected[0] - 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The schedule has moved ranks, and the same ones.
    ranks = open_ranks_of(ours)
    assert sum(ranks.values()) == 2 * len(ranks) and len(set(ranks.values())) > 1
    assert ranks == open_ranks_of(plain)


def reference_losses_of(tiny, closed):
    """Losses of PEFT alone on the open layers: their names as target_modules, ours as start."""
    ours = tiny.attached(config_of(), tiny.base(dtype=torch.float32))
    names = [n.removeprefix("base_model.model.") for n in svd_layers(ours) if not closed(n)]
    plain = get_peft_model(tiny.base(dtype=torch.float32), config_of(target_modules=names))
    state = {n: p for n, p in ours.state_dict().items() if n in plain.state_dict()}
    assert any("lora_E" in name for name in state)
    plain.load_state_dict(state, strict=False)
    return losses_of(plain, tiny), open_ranks_of(plain)


def closed_layers(name):
    return "layers.0.mlp" in name or name.endswith(("k_proj", "o_proj"))


def test_under_a_mask_the_schedule_is_that_of_the_open_layers_alone(tiny, tmp_path):
    expected, ranks = reference_losses_of(tiny, closed_layers)
    ours = tiny.attached(config_of(), tiny.base(dtype=torch.float32))
    mask = mask_of(ours, closed_layers)
    ila.apply_mask(ours, mask)
    found = losses_of(ours, tiny)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert open_ranks_of(ours) == ranks and sum(ranks.values()) == 2 * len(mask.open)
    # The saved adapter holds the open modules and no other, and plain PEFT loads it.
    ours.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[0] for name in saved} == set(mask.open)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert len(pattern) == len(mask.open)
    loaded = tiny.loaded(tiny.base(dtype=torch.float32), tmp_path)
    kinds = {n: type(m) for n, m in loaded.named_modules() if isinstance(m, SVDLinear)}
    assert set(kinds) == set(mask.open) and set(kinds.values()) == {SVDLinear}
    ours.eval()
    with torch.no_grad():
        logits = {"logits": ours(tiny.tokens()).logits}
        tiny.assert_close({"logits": loaded(tiny.tokens()).logits}, logits, 1e-5)
        with ours.disable_adapter():
            assert tiny.differs({"logits": ours(tiny.tokens()).logits}, logits)


def test_kept_layers_are_constants_of_the_schedule(tiny):
    ours = stirred(tiny.attached(config_of(), tiny.base(dtype=torch.float32)))
    losses_of(ours, tiny, steps=8)
    mask = mask_of(ours, closed_layers)
    ila.apply_mask(ours, mask, closed="keep")
    adapters = {n: p for n, p in ours.named_parameters() if ".lora_" in n}
    kept = {
        n: p.detach().clone()
        for n, p in adapters.items()
        if n.partition(".lora_")[0] in mask.closed
    }
    assert len(kept) == 3 * len(mask.closed)
    losses_of(ours, tiny)
    for name, before in kept.items():
        assert torch.equal(ours.get_parameter(name), before), name
    ranks = {n: r for n, r in open_ranks_of(ours).items() if n not in kept}
    assert len(ranks) == len(mask.open) and sum(ranks.values()) == 2 * len(mask.open)


def test_a_layer_opened_again_counts_again(tiny, tmp_path):
    ours = tiny.attached(config_of(), tiny.base(dtype=torch.float32))
    every = tuner_of(ours).rankallocator.init_bgt
    ila.apply_mask(ours, mask_of(ours, closed_layers))
    losses_of(ours, tiny)
    assert tuner_of(ours).rankallocator.init_bgt < every
    ila.apply_mask(ours, mask_of(ours, lambda name: False))
    assert tuner_of(ours).rankallocator.init_bgt == every
    losses_of(ours, tiny, steps=2)
    ours.save_pretrained(tmp_path)
    tiny.loaded(tiny.base(dtype=torch.float32), tmp_path)


def test_restore_gives_pefts_own_layers_and_schedule(tiny):
    plain = stirred(tiny.plain(config_of()))
    ours = stirred(tiny.attached(config_of()))
    ila.apply_mask(ours, mask_of(ours, closed_layers))
    ila.restore(ours)
    assert not svd_layers(ours)
    allocators = [tuner_of(model).rankallocator for model in (ours, plain)]
    assert type(allocators[0]) is RankAllocator
    assert allocators[0].init_bgt == allocators[1].init_bgt
    tiny.assert_equal(tiny.run(ours), tiny.run(plain))


def test_scales_reach_layers_set_aside(tiny):
    ours = stirred(tiny.attached(config_of()))
    ila.apply_mask(ours, mask_of(ours, closed_layers))
    for layer in svd_layers(ours).values():
        layer.scale_layer(2.0)
    ila.apply_mask(ours, mask_of(ours, lambda name: False))
    assert {layer.scaling["default"] for layer in svd_layers(ours).values()} == {12.0}


def test_explain_names_the_path(tiny):
    ours = tiny.attached(config_of())
    ila.apply_mask(ours, mask_of(ours, closed_layers))
    rows = ila.explain(ours, tokens=64).rows
    assert {row.module for row in rows} == set(svd_layers(ours))
    assert {row.open for row in rows} == {True, False}
    assert all(("AdaLoRA on nn.Linear" in row.why) == row.open for row in rows)

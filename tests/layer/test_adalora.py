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
    return {
        n: int((p != 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n
    }


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

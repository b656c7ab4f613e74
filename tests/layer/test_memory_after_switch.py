"""After ``SelectLayers`` has closed layers, a step of Llama-3-8B takes what its mask counts.

Shapes of Llama-3-8B, rank 16 on every linear layer, fp32 adapters over bf16, no data. Everything
that is alive is counted, whoever holds it: the model, AdamW, the callback.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import TrainerControl, TrainerState, TrainingArguments

import ila
from benchmarks.memory import count, rows, true_size
from benchmarks.memory.live_bytes import TOKENS, Bytes, LiveBytes, bytes_of
from ila.models.edit import masked_layers
from ila.search.selection import Selection

BLOCKS = 4  # of 32, which take a minute a case
SWITCH = 2
TOKEN_BYTES = torch.long.itemsize  # a token's
POSITIONS = {"scattered": lambda: true_size.at_random(0), "top": lambda: float}


def adapted():
    base = rows.without_mask(true_size.build("llama-3-8b", BLOCKS))
    return true_size.converted(true_size.adapted(base))


def mask_of(model, position):
    """Return a mask that opens 30 % of the layers."""
    rank_of = POSITIONS[position]()
    names = masked_layers(model, "default")
    scores = {name: rank_of(place) for place, name in enumerate(names)}
    return ila.LayerMask(scores).top(true_size.OPEN)


def step(model, optimizer, ids, live):
    """Run a training step; return what forward keeps and the peaks before the optimiser's turn."""
    gc.collect()
    start = live.now
    live.begin_anew()
    loss = model(**count.batch_of(model, ids)).loss
    gc.collect()
    kept = live.now.minus(start)
    loss.backward()
    peaks = count.envelope([peak.minus(start) for peak in live.peaks])
    del loss
    if not optimizer.state:  # fake tensors cannot read the number of a second step
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    return {"start": start, "kept": kept, "peaks": peaks}


def switch(model, optimizer, mask, closed, folder, monkeypatch):
    """Let ``SelectLayers`` go through its calls of a run, with a choice that is known."""
    monkeypatch.setattr(Selection, "choose", lambda *_: mask)
    chosen = ila.SelectLayers(at=SWITCH, top=true_size.OPEN, closed=closed)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    state, control = TrainerState(max_steps=8), TrainerControl()
    parts = {"model": model, "optimizer": optimizer}
    parts["train_dataloader"] = SimpleNamespace(dataset=[], collate_fn=None)
    chosen.on_train_begin(arguments, state, control, **parts)
    state.global_step = SWITCH
    chosen.on_step_begin(arguments, state, control, **parts)
    assert chosen.mask is mask


def alive(closed, position, change):
    """Count a step of a model that ``change`` closes after a step with all layers open.

    Without ``change``, of a model whose mask was there from the start.
    """
    model = adapted()
    mask = mask_of(model, position)
    with FakeTensorMode(), LiveBytes(TOKENS) as live:
        true_size.fake(model)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        if change is None:
            ila.apply_mask(model, mask, closed=closed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        step(model, optimizer, ids, live)
        before = adam(optimizer)
        if change is not None:
            change(model, optimizer, mask, closed)
        found = step(model, optimizer, ids, live)
        trained = {p for p in model.parameters() if p.requires_grad}
        found |= {"adam before": before, "adam": adam(optimizer)}
        found["states of what trains"] = set(optimizer.state) == trained
    return found


def adam(optimizer):
    return bytes_of(t for state in optimizer.state.values() for t in state.values())


def counted(closed, position):
    """Count a mask as ``benchmarks.memory`` does; return the sizes of the closed adapters too."""
    model = adapted()
    mask = mask_of(model, position)
    names = tuple(f"{name}." for name in mask.closed)
    parts = [p for n, p in model.named_parameters() if ".lora_" in n and n.startswith(names)]
    ila.apply_mask(model, mask, closed=closed)
    return count.count(model), [p.numel() * p.element_size() for p in parts]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("closed", ["keep", "drop"])
def test_a_step_after_the_switch_takes_what_the_mask_counts(
    closed, position, tmp_path, monkeypatch
):
    found = alive(closed, position, lambda *parts: switch(*parts, tmp_path, monkeypatch))
    masked, (expected, sizes) = alive(closed, position, None), counted(closed, position)
    # To the byte, and at every length: what is alive, what forward keeps, the peak, AdamW's states.
    for name in ("start", "kept", "peaks", "adam"):
        assert found[name] == masked[name], name
    assert found["kept"] == expected["kept"] and found["peaks"] == expected["peaks"]
    assert found["adam"] == expected["optimizer"]
    stands = sum(expected[name] for name in ("weights", "adapters", "optimizer"))
    # A kept adapter is a weight. A dropped one is set aside, for `ila.restore`, and not counted.
    aside = sum(sizes) if closed == "drop" else 0
    assert found["start"] == Bytes(stands + aside, TOKEN_BYTES)

    # The states of closed layers are gone: two moments and a number of steps for each parameter.
    assert len(sizes) == 2 * 20
    assert found["adam before"] - found["adam"] == sum(2 * size + 4 for size in sizes)
    assert found["states of what trains"]


def test_a_kept_adapter_costs_its_own_bytes():
    for position in POSITIONS:
        (kept, sizes), (dropped, _) = (counted(closed, position) for closed in ("keep", "drop"))
        assert kept["weights"] - dropped["weights"] == sum(sizes) > 0
        for name in ("adapters", "optimizer", "gradients"):
            assert kept[name] == dropped[name], name

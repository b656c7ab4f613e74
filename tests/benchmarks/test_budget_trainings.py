"""The trainings of the benchmark of budgets: every seed holds out the rows of the search."""

import json
from argparse import Namespace

import pytest

from benchmarks import budget
from benchmarks.budget import TRAINED, Run
from ila.masks.mask import LayerMask
from ila.masks.names import PEFT_PREFIX
from ila.training.train import train

KINDS = [f"self_attn.{name}_proj" for name in "qkvo"]
KINDS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LAYERS = [f"{PEFT_PREFIX}model.layers.{block}.{kind}" for block in range(2) for kind in KINDS]
SCORES = {name: float(place) for place, name in enumerate(LAYERS)}


@pytest.fixture
def options(tiny_model_folder, tmp_path):
    """Options of small trainings, on a mask whose search had seed 5."""
    rows = [{"instruction": f"say {n}", "output": f"{n} {n}"} for n in range(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    mask = tmp_path / "mask.json"
    LayerMask(SCORES, provenance={"inputs": {"seed": 5, "limit": 20, "held_out": 0.1}}).save(mask)
    return Namespace(
        model=str(tiny_model_folder),
        data=data,
        mask=mask,
        work=tmp_path,
        limit=20,
        max_length=32,
        rank=2,
        batch_size=2,
        learning_rate=1e-2,
        steps=3,
        seeds=2,
    )


def test_a_seed_draws_the_adapter_and_not_the_held_out_rows(options, monkeypatch):
    run, adapters = Run(options), []

    def training(model, *given, **more):
        weights = [p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n]
        adapters.append(weights[0])
        return train(model, *given, **more)

    monkeypatch.setattr(budget, "train", training)
    for seed in (0, 1):
        run._train("top 0.5", run.mask.top(0.5), 3, seed)
    assert not adapters[0].equal(adapters[1])
    first, second = (
        json.loads((options.work / TRAINED / f"top-0.5-seed-{seed}.json").read_text("utf-8"))
        for seed in (0, 1)
    )
    # A fresh adapter changes nothing, so only the rows decide the loss before.
    assert first["held_out_loss_before"] == second["held_out_loss_before"]
    assert first["held_out_loss"] != second["held_out_loss"]
    assert first["open_modules"] == 7 and first["total_modules"] == 14
    assert run.inputs.seed == 5 and len(run.rows().held_out) == 2


def test_a_mask_that_divided_other_rows_is_refused(options):
    options.limit = 10
    with pytest.raises(ValueError, match="its search had limit=20, these trainings have 10"):
        Run(options)
    LayerMask(SCORES).save(options.mask)
    with pytest.raises(ValueError, match="it names no inputs"):
        Run(options)

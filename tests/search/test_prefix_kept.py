"""The prefix cache below layers that keep what they learned: exact, and stale when that changes."""

import torch

import ila
from ila.data.encoding import Collator
from ila.models.edit import masked_layers
from ila.prefix.cache import PrefixCache
from ila.training.config import TrainConfig
from ila.training.train import train


def keep_first_block(model):
    names = list(masked_layers(model, "default"))
    mask = ila.LayerMask(dict.fromkeys(names, 0.0), {name: "layers.1." in name for name in names})
    ila.apply_mask(model, mask, closed="keep")
    return model


def test_losses_are_those_of_the_plain_run_within_rounding(make_llama, rows):
    found = []
    for cached in (False, True):  # LoRA's dropout is 0.1, in the open block alone
        model = keep_first_block(make_llama(init_lora_weights=False))
        config = TrainConfig(
            steps=8, batch_size=2, learning_rate=1e-2, save_every=None, cache_prefix=cached
        )
        metrics = train(model, rows, config, progress=False)
        assert metrics["kept_modules"] == 7 and metrics["open_modules"] == 7
        assert (metrics["prefix_cache"] or {}).get("blocks") == (1 if cached else None)
        found.append(torch.tensor([loss for _, loss in metrics["losses"]]))
    plain, cached = found
    assert (plain - cached).abs().max() <= 16 * torch.finfo(torch.float32).eps * plain.max()


def test_other_kept_adapters_make_the_states_stale(make_llama, rows, tmp_path):
    def prepare(model):
        return PrefixCache.prepare(model, rows, Collator(0), tmp_path / "cache", progress=False)

    model = keep_first_block(make_llama(init_lora_weights=False))
    assert prepare(model).built == "there is none"
    assert prepare(model).built is None
    kept = next(
        layer for layer in masked_layers(model, "default").values() if layer.is_kept("default")
    )
    with torch.no_grad():
        kept.lora_B["default"].weight[0, 0] += 1e-3
    assert prepare(model).built == "it was computed from another model"

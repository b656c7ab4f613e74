"""Laws of the prefix cache: the same losses without the prefix, or a refusal that says why."""

import json
import pickle
import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import GraniteConfig, GraniteForCausalLM

import ila
import ila.prefix.state_file
import ila.runs.atomic
from ila.data.encoding import Collator
from ila.masks.mask import LayerMask
from ila.models.blocks import find_blocks
from ila.models.edit import masked_layers
from ila.prefix.cache import PrefixCache
from ila.prefix.state_file import CacheError, open_states, write_states
from ila.training.config import TrainConfig
from ila.training.loop import default_collator
from ila.training.train import train


def ragged(count=9, seed=0):
    """Rows of many lengths, so that every batch is padded."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3, 24) for _ in range(draw.randrange(3, 16))]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def opened(model, wanted=("layers.1.",)):
    """Open the layers whose names hold one of `wanted`."""
    names = list(masked_layers(model, "default"))
    gates = {name: any(part in name for part in wanted) for name in names}
    ila.apply_mask(model, LayerMask(dict.fromkeys(names, 0.0), gates))
    return model


def prepare(model, rows, folder, collator=None, **options):
    options = {"batch_size": 4, "progress": False} | options
    return PrefixCache.prepare(model, rows, collator or Collator(0), folder, **options)


def quick(**changes):
    options = {"steps": 12, "batch_size": 3, "learning_rate": 1e-2, "save_every": None}
    return TrainConfig(**options | changes)


class Runs:
    """How often the blocks of a model run."""

    def __init__(self, model):
        self.counts = [0, 0]
        for at, block in enumerate(find_blocks(model).layers):
            block.mlp.register_forward_pre_hook(lambda *_, at=at: self.add(at))

    def add(self, at):
        self.counts[at] += 1


# ---- exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_are_those_of_the_plain_run_within_rounding(dtype, make_llama):
    rows, found = ragged(), {}
    for name, of, cached in (("exact", torch.float64, False), ("plain", dtype, False),
                             ("cached", dtype, True)):  # fmt: skip
        model = opened(make_llama(init_lora_weights=False).to(of))  # LoRA's dropout is 0.1
        metrics = train(model, rows, quick(cache_prefix=cached), progress=False)
        found[name] = torch.tensor([loss for _, loss in metrics["losses"]], dtype=torch.float64)
        assert len(found[name]) == 12 and (metrics["prefix_cache"] is not None) == cached
    # Llama's norms and loss round to float32 in a float64 model too.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    allowed = 2 * ((found["plain"] - found["exact"]).abs().max() + eps * found["exact"].max())
    assert (found["cached"] - found["exact"]).abs().max() <= allowed
    assert found["exact"][0] != found["exact"][-1]


def test_gradients_are_those_of_the_tokens(make_llama, tmp_path):
    """In float64, whatever the padding, at rounding of the float32 inside Llama's norms."""
    rows = ragged()
    model = opened(make_llama(init_lora_weights=False, lora_dropout=0.0).double()).train()
    cache = prepare(model, rows, tmp_path)
    batch = [cache.dataset[i] for i in (7, 0, 4)]
    plain = Collator(0)([rows[i] for i in (7, 0, 4)])
    gradients = []
    for inputs in (plain, cache.collator(batch)):
        model.zero_grad(set_to_none=True)
        if "inputs_embeds" in inputs:
            with cache.skipping():
                loss = model(**inputs).loss
        else:
            loss = model(**inputs).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({"loss": loss.detach(), **grads})
    assert len(gradients[0]) == 1 + 2 * 7
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).abs().max()
        assert error <= 8 * torch.finfo(torch.float32).eps * expected.abs().max(), name


def test_the_prefix_runs_once_per_row_and_never_in_a_step(make_llama, tmp_path):
    rows, model = ragged(), opened(make_llama())
    runs = Runs(model)
    cache = prepare(model, rows, tmp_path)
    assert cache.built == "there is none" and cache.blocks == 1
    # The longest row and the shortest: together twice, each alone, once in whole; then all rows in
    # batches of 4.
    assert runs.counts == [2 + 2 + 1 + 3, 2]
    assert cache.states.bytes == sum(len(r["input_ids"]) for r in rows) * 16 * 4
    with cache.skipping():
        model(**cache.collator([cache.dataset[i] for i in range(4)]))
        assert runs.counts == [8, 3]
        with pytest.raises(RuntimeError, match="takes batches of the prefix cache, not token ids"):
            model(input_ids=torch.tensor([[3, 4]]))
    model(input_ids=torch.tensor([[3, 4]]))
    assert runs.counts == [9, 4]
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_mixed_precision_caches_what_the_step_would_compute(make_llama):
    rows, losses = ragged(), []
    for cached in (False, True):
        model = opened(make_llama(lora_dropout=0.0))
        config = quick(steps=3, cache_prefix=cached,
                       training_args={"bf16": True, "use_cpu": True})  # fmt: skip
        losses.append([x for _, x in train(model, rows, config, progress=False)["losses"]])
    # bf16 products: two batches of other shapes differ by a rounding or two of the states.
    assert losses[1] == pytest.approx(losses[0], rel=2 * 2**-8)


# ---- kept, and found again


def test_states_are_used_again_by_a_run_of_the_same_prefix(make_llama, tmp_path):
    rows = ragged()
    folder = tmp_path / "cache"
    first = train(opened(make_llama()), rows, quick(cache_prefix=str(folder)), progress=False)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    other = opened(make_llama(), ("layers.1.mlp",))  # another mask, the same prefix
    again = train(other, rows, quick(cache_prefix=str(folder)), progress=False)
    assert first["prefix_cache"]["built"] == "there is none"
    assert again["prefix_cache"]["built"] is None
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_finished_run_keeps_no_cache_of_its_own(make_llama, tmp_path):
    out = tmp_path / "run"
    train(opened(make_llama()), ragged(), quick(cache_prefix=True), output_dir=out, progress=False)
    assert (out / "metrics.json").exists() and not (out / "prefix-cache").exists()


def test_stale_states_are_computed_again(make_llama, tmp_path):
    rows = ragged()
    prepare(opened(make_llama()), rows, tmp_path)
    kept = prepare(opened(make_llama()), rows, tmp_path)
    assert kept.built is None
    model = opened(make_llama())
    with torch.no_grad():
        find_blocks(model).layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    found = prepare(model, rows, tmp_path)
    assert found.built == "it was computed from another model"
    assert not torch.equal(found.states[0], kept.states[0])
    assert prepare(model, rows[1:], tmp_path).built == "it was computed from another data"
    changed = [*rows[:-1], {**rows[-1], "input_ids": [5, *rows[-1]["input_ids"][1:]]}]
    assert prepare(model, changed, tmp_path).built == "it was computed from another data"
    found = prepare(model.to(torch.bfloat16), changed, tmp_path)
    assert "dtype" in found.built and found.states.dtype == torch.bfloat16


def test_frozen_adapters_in_the_prefix_are_part_of_the_model(make_llama, tmp_path):
    """Not closed by a mask, only not trained: they belong to what is computed once."""
    rows, model = ragged(), make_llama(lora_dropout=0.0, init_lora_weights=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "layers.1." in name)
    before = prepare(model, rows, tmp_path)
    assert before.blocks == 1
    layer = next(iter(masked_layers(model, "default").values()))
    layer.scaling["default"] *= 2
    after = prepare(model, rows, tmp_path)
    assert after.built == "it was computed from another model"
    assert not torch.equal(before.states[0], after.states[0])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the states": lambda f: flip(f / "states.bin"),
    "the end of the states": lambda f: (f / "states.bin").write_bytes(b"1234"),
    "the states": lambda f: (f / "states.bin").unlink(),
    "the end of the index": lambda f: (f / "index.json").write_text("{"),
    "the index": lambda f: (f / "index.json").unlink(),
    "a key of the index": lambda f: (f / "index.json").write_text('{"format": 1}'),
    "the format": lambda f: (f / "index.json").write_text('{"format": 0}'),
    "all of it": lambda f: [p.unlink() for p in f.iterdir()],
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_states_are_computed_again(what, make_llama, tmp_path):
    rows, model = ragged(), opened(make_llama())
    expected = prepare(model, rows, tmp_path)
    values = [expected.states[i].clone() for i in range(len(rows))]
    DAMAGE[what](tmp_path / "states")
    found = prepare(model, rows, tmp_path)
    assert found.built
    assert all(torch.equal(found.states[i], values[i]) for i in range(len(rows)))
    assert prepare(model, rows, tmp_path).built is None


@pytest.mark.parametrize("when", ["while it computes", "before the folder is renamed"])
def test_a_kill_leaves_the_old_cache_or_none(when, make_llama, tmp_path, break_off, killed):
    rows, other = ragged(), ragged(seed=1)
    model = opened(make_llama())
    old = prepare(model, rows, tmp_path)
    if when == "while it computes":
        break_off(ila.prefix.state_file.zlib, "crc32", len(other) + 3, error=killed)
    else:
        break_off(ila.runs.atomic, "_put_in_place", 1, error=killed)
    with pytest.raises(killed):
        prepare(model, other, tmp_path)
    assert open_states(tmp_path / "states", old.states.source).bytes == old.states.bytes
    # What a kill that nothing could catch would leave is removed by the next that computes.
    (tmp_path / ".ila-tmp-0123").mkdir()
    assert prepare(model, other, tmp_path).built == "it was computed from another data"
    assert [p.name for p in tmp_path.iterdir()] == ["states"]


def test_a_resumed_run_ends_with_the_same_losses(make_llama, tmp_path, break_off, killed):
    rows, config = ragged(), quick(cache_prefix=True, save_every=3)
    expected = train(opened(make_llama()), rows, config, progress=False)["losses"]
    options = {"output_dir": tmp_path / "run", "progress": False}
    model = opened(make_llama())
    break_off(find_blocks(model).layers[1].input_layernorm, "forward", 10, error=killed)
    with pytest.raises(killed):
        train(model, rows, config, **options)
    assert not [m for m in find_blocks(model).layers[:1].modules() if "forward" in vars(m)]
    metrics = train(opened(make_llama()), rows, config, resume=True, **options)
    assert metrics["losses"] == expected
    assert metrics["prefix_cache"]["built"] is None


# ---- refused


def refused(model, rows, folder, match, **options):
    with pytest.raises(ValueError, match=match):
        prepare(model, rows, folder, **options)
    assert not list(folder.iterdir())


def test_no_frozen_prefix_is_refused(make_llama, tmp_path):
    rows = ragged(3)
    refused(make_llama(), rows, tmp_path, "there is none: the first block has an open layer")
    model = opened(make_llama(), ("layers.0.mlp.down_proj", "layers.1."))
    refused(model, rows, tmp_path, "there is none: the first block has an open layer")
    model = opened(make_llama(modules_to_save=["embed_tokens"]))
    refused(model, rows, tmp_path, "there is none: the embedding is trained")
    refused(torch.nn.Linear(1, 1), rows, tmp_path, "needs a model with blocks, got Linear")


def test_a_random_prefix_is_refused(make_llama, tmp_path):
    rows, config = ragged(3), "set it to 0 in the model's configuration"
    model = opened(make_llama())
    find_blocks(model).layers[0].self_attn.attention_dropout = 0.1
    refused(model, rows, tmp_path, f"dropout 0.1 is active .*LlamaAttention.*{config}")
    model = make_llama()  # frozen, but not closed: its dropout of 0.1 runs
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "layers.1." in name)
    refused(model, rows, tmp_path, "dropout 0.1 is active in the frozen prefix")
    model = opened(make_llama())
    find_blocks(model).layers[0].register_forward_hook(lambda m, i, out: out + torch.rand(1))
    refused(model, rows, tmp_path, "the frozen prefix computes at random")
    model = opened(make_llama())
    with pytest.raises(ValueError, match="NEFTune adds noise"):
        config = quick(cache_prefix=True, training_args={"neftune_noise_alpha": 5.0})
        train(model, rows, config, progress=False)


def test_a_model_whose_blocks_need_more_than_states_is_refused(tmp_path):
    """Granite scales what it takes for embeddings."""
    config = GraniteConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, embedding_multiplier=2.0,
    )  # fmt: skip
    options = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = opened(ila.attach(GraniteForCausalLM(config), options))
    refused(model, ragged(3), tmp_path, r"\(GraniteModel\) need more than hidden states")


def test_too_large_a_cache_is_refused_before_it_is_computed(make_llama, tmp_path):
    rows, model = ragged(), opened(make_llama())
    need = sum(len(r["input_ids"]) for r in rows) * 16 * 4
    runs = Runs(model)
    refused(model, rows, tmp_path, "exceed its limit of 0.00 GiB.*tokens of 16 × 4 bytes",
            limit_bytes=need - 1)  # fmt: skip
    assert runs.counts == [5, 2]  # the trial on two rows only
    assert prepare(model, rows, tmp_path, limit_bytes=need).states.bytes == need


def test_a_full_disk_is_refused_before_it_is_computed(make_llama, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(ila.prefix.cache.shutil, "disk_usage", lambda _: usage)
    refused(opened(make_llama()), ragged(), tmp_path, "does not fit on its disk, 10 bytes free")


def test_rows_without_tokens_are_refused(make_llama, tmp_path):
    rows = [*ragged(2), {"input_ids": [], "labels": []}]
    refused(opened(make_llama()), rows, tmp_path, "at least one token, row 2 has none")


def left(rows):
    batch = Collator(0)(rows)
    return {name: values.flip(1) for name, values in batch.items()}


def cut(rows):
    return {name: values[:, 1:] for name, values in Collator(0)(rows).items()}


def more(rows):
    batch = Collator(0)(rows)
    return {**batch, "position_ids": batch["input_ids"]}


def loud(rows):
    batch = Collator(0)(rows)
    return {**batch, "labels": batch["input_ids"]}


@pytest.mark.parametrize(
    ("collator", "match"),
    [
        (left, "pad on the right"),
        (cut, "keep each row's tokens"),
        (more, r"does not know what \['position_ids'\] of the collator mean"),
        (loud, "labels must be -100 on padding"),
    ],
)
def test_a_collator_that_does_more_than_pad_is_refused(collator, match, make_llama, tmp_path):
    model = opened(make_llama())
    with pytest.raises(ValueError, match=match):
        prepare(model, ragged(), tmp_path, collator)
    assert not list(tmp_path.iterdir())
    # One that does so later is refused when its batch comes up.
    cache = prepare(model, ragged(), tmp_path)
    late = replace(cache.collator, inner=collator)
    with pytest.raises(ValueError, match=match):
        late([cache.dataset[i] for i in range(4)])


def with_positions(row):
    return {**row, "position_ids": [*range(len(row["input_ids"]))]}


def with_hidden_tokens(row):
    mask = [0] + [1] * (len(row["input_ids"]) - 1)
    return {**row, "attention_mask": mask, "labels": [-100, *row["labels"][1:]]}


def packed(row):
    half = len(row["input_ids"]) // 2
    rest = len(row["input_ids"]) - half
    return {**row, "position_ids": [*range(half), *range(rest)]}


@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_positions, r"does not know what \['position_ids'\]"),
        (packed, r"does not know what \['position_ids'\]"),
        (with_hidden_tokens, r"changed row \d+, or attention_mask holds 0 in that row"),
    ],
)
def test_rows_that_are_more_than_tokens_are_refused_before_a_state(
    change, match, place, make_llama, tmp_path
):
    """All rows if the place is the first; else one row, also beyond the first batch."""
    rows = ragged()
    assert len(rows) > 8
    rows = [change(row) if place == 0 or row is rows[place] else row for row in rows]
    model = opened(make_llama())
    runs = Runs(model)
    with pytest.raises(ValueError, match=match):
        prepare(model, rows, tmp_path, default_collator(model))
    assert runs.counts == [0, 0] and not list(tmp_path.iterdir())


def test_data_that_changes_is_refused_when_it_comes_up(make_llama, tmp_path):
    rows = ragged()
    cache = prepare(opened(make_llama()), rows, tmp_path)
    rows[2] = {"input_ids": rows[2]["input_ids"][::-1], "labels": rows[2]["labels"]}
    cache.collator([cache.dataset[i] for i in (0, 1)])
    with pytest.raises(ValueError, match="row 2 of the dataset has changed"):
        cache.collator([cache.dataset[i] for i in (0, 2)])
    with pytest.raises(ValueError, match="set remove_unused_columns=False"):
        cache.collator(rows[:1])


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_out_of_range_is_refused(limit):
    with pytest.raises(ValueError, match=r"^cache_limit_gib must be positive"):
        TrainConfig(cache_limit_gib=limit)


# ---- the file


def test_a_worker_maps_the_file_for_itself(make_llama, tmp_path):
    cache = prepare(opened(make_llama()), ragged(), tmp_path)
    pickled = pickle.dumps(cache.states)
    assert len(pickled) < cache.states.bytes
    assert torch.equal(pickle.loads(pickled)[3], cache.states[3])


def test_states_of_another_shape_or_none_are_not_written(tmp_path):
    rows, source, place = [[1, 2], [3]], {"model": "a"}, tmp_path / "states"
    good = [(0, torch.ones(2, 4)), (1, torch.zeros(1, 4))]
    for wrong, match in (
        (good[:1], "states of row 1 are missing"),
        ([good[0], (1, torch.zeros(2, 4))], r"states of row 1 must be \(1, 4\)"),
        ([good[0], (1, torch.zeros(1, 4).half())], r"row 1 must be .*float32, got .*float16"),
    ):
        with pytest.raises(ValueError, match=match):
            write_states(place, source, rows, 4, torch.float32, wrong)
        assert not list(tmp_path.iterdir())
    write_states(place, source, rows, 4, torch.float32, reversed(good))
    states = open_states(place, source)
    assert [states[i].tolist() for i in (0, 1)] == [v.tolist() for _, v in good]
    states[0].zero_()  # a reader cannot damage the file
    assert open_states(place, source)[0].sum() == 8
    with pytest.raises(CacheError, match=r"another model$"):
        open_states(place, {"model": "b"})
    index = json.loads((place / "index.json").read_text())
    assert index["lengths"] == [2, 1] and index["dtype"] == "float32"

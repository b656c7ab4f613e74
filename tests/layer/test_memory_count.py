"""Memory at true size: the count is what a real step takes, at every length, and NF4 is NF4's."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch._subclasses import FakeTensorMode

import ila.models.checkpointing
from benchmarks.harness.memory import allocated
from benchmarks.memory import capacity, check, count, rows, true_size
from benchmarks.memory.live_bytes import TOKENS, Bytes, LiveBytes, bytes_of, split
from benchmarks.sections import memory_counts
from ila.models.lean_loss import chunk_rows
from ila_kernels.eager import SHORT_ROWS

ROWS = check.contestants()
LONG = 2 * SHORT_ROWS  # at fewer tokens, on a CPU, our layers keep what plain autograd does


def pair(tiny, row):
    """The same model twice: on the meta device and real."""
    made = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            base = tiny.base(dtype=torch.bfloat16).to(device)
        base = rows.without_mask(base.requires_grad_(False).train())
        made.append(ROWS[row](base, device == "meta"))
    return made


def scratch_of_product(weight):
    """What this CPU's product of a chunk's dz (M, V) with W allocates beside its result."""
    dz = torch.zeros(LONG, weight.shape[0], dtype=weight.dtype)
    _, result, peak = allocated(lambda: dz @ weight.detach())
    return peak - result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_the_count_is_what_the_allocator_hands_out(tiny, row, checkpointing):
    counted, real = pair(tiny, row)
    counted = check.at(count.count(counted, checkpointing), LONG)
    measured = check.measure(real, checkpointing, LONG)
    # Two things are made without an operator, the second in the host's memory: autograd keeps
    # PEFT's `* scaling` as a tensor of 8 bytes, and a checkpoint keeps the CPU generator's state.
    adapters = len([n for n, _ in real.named_modules() if n.endswith("lora_A.default")])
    blocks = len(real.get_base_model().model.layers) - ila.models.checkpointing.frozen_blocks(real)
    unseen = 8 * adapters if row == "PEFT" else 0
    unseen += blocks * torch.get_rng_state().nbytes if checkpointing else 0
    counted |= {key: counted[key] + unseen for key in ("kept", "peak")}
    for key in ("weights", "adapters", "optimizer", "gradients", "kept"):
        assert measured[key] == counted[key], key
    # With checkpoints it is reached inside a block, where attention's backward has its own scratch.
    # Without, a lean head's is reached inside its last product, which has some too.
    inside = 0 if row == "PEFT" else scratch_of_product(real.get_base_model().lm_head.weight)
    assert measured["peak"] in (counted["peak"], counted["peak"] + inside) or (
        checkpointing and measured["peak"] > counted["peak"]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_count_holds_at_every_length(tiny, checkpointing):
    predicted = count.count(pair(tiny, "ours, all open")[0], checkpointing)
    for tokens in (LONG, 3 * LONG + 1):
        model = pair(tiny, "ours, all open")[0]
        if checkpointing:
            count.checkpoint_blocks(model)
        with FakeTensorMode():
            stored = rows.fake(model)
            ids = torch.zeros(1, tokens, dtype=torch.long)
            counted = count.count_step(model, stored, ids, by_token=False)
        assert predicted["kept"].at(tokens) == counted["kept"].constant
        (peak,) = counted["peaks"]
        assert max(line.at(tokens) for line in predicted["peaks"]) == peak.constant
        assert predicted["optimizer"] == counted["optimizer"]


def test_fake_nf4_has_the_tensors_of_real_nf4():
    shape = (64, 320)  # 320 scales: more than one block of scales, the last of them not full
    real = Linear4bit(320, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    real.weight = Params4bit(torch.randn(shape), quant_type="nf4", requires_grad=False)
    real = real.to("cpu")
    packed, state = rows._pack(torch.empty(shape))
    is_state = real.weight.quant_state
    pairs = [(packed, real.weight), (state.absmax, is_state.absmax), (state.code, is_state.code)]
    pairs += [(state.offset, is_state.offset), (state.state2.absmax, is_state.state2.absmax)]
    pairs += [(state.state2.code, is_state.state2.code)]
    for fake, true in pairs:
        assert (fake.shape, fake.dtype) == (true.shape, true.dtype)
    assert (state.blocksize, state.state2.blocksize) == (
        is_state.blocksize, is_state.state2.blocksize,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.75, 0.3, 0.1])
def test_peft_restricted_opens_the_layers_that_the_mask_opens(share):
    row_of = {(r.contestant, r.position): r for r in rows.rows("nf4") if r.share == share}
    for position in ("top", "bottom", "scattered"):
        ours, peft = (
            row_of[who, position].adapt(rows.build("mistral-7b", "nf4", 2))
            for who in (rows.OURS, rows.RESTRICTED)
        )
        trained = [
            {n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, peft)
        ]
        assert trained[0] == trained[1] and abs(len(trained[0]) / 28 - share) < 1 / 14


def test_a_storage_counts_while_something_holds_it():
    x = torch.ones(1000)
    with LiveBytes() as live:
        live.add([x])
        view = (x + 1)[10:]
        assert live.now == Bytes(8000)
        y = view * 2
        del view
        assert live.now == Bytes(4000 + 3960) and live.peaks == [Bytes(8000 + 3960)]
        live.begin_anew()
        del y
    assert live.now == Bytes(4000) and live.peaks == [Bytes(4000 + 3960)]
    assert bytes_of([x, x[3:]]) == 4000


def test_peaks_are_the_envelope_of_all_counts():
    lines = [Bytes(100, 1), Bytes(0, 11), Bytes(90, 3), Bytes(40, 8), Bytes(50, 1), Bytes(70, 5)]
    found = count.envelope(lines)
    for tokens in range(1, 60):
        assert max(x.at(tokens) for x in found) == max(x.at(tokens) for x in lines)
    assert found == [Bytes(100, 1), Bytes(90, 3), Bytes(40, 8), Bytes(0, 11)]


def test_the_longest_row_is_the_last_that_fits(tiny):
    found = count.count(pair(tiny, "PEFT")[0])
    for card in (10**6, 10**8):
        tokens = capacity.longest(found, card)
        assert capacity.total(found, tokens) <= card < capacity.total(found, tokens + 1)
    assert capacity.longest(found, found["weights"]) == 0


def test_sizes_are_split_by_the_primes_that_they_hold():
    assert split(5 * 2017, 2017) == Bytes(0, 5) and split(5 * 2018, 2017) == Bytes(5, 5)
    assert split(4096 * 11008, 2017) == Bytes(4096 * 11008) and split(2017, None) == Bytes(2017)


def test_the_step_that_is_counted_has_more_than_two_chunks_of_every_head():
    assert all(TOKENS % n and (TOKENS + 1) // 2 % n for n in range(2, 65))
    for _, _, shape in true_size.SHAPES.values():
        assert 2 * chunk_rows(shape["vocab_size"], torch.bfloat16) < TOKENS


def test_the_rows_of_the_tables_are_counted_and_named_alike():
    """The page knows neither torch nor PEFT, so it repeats the contestants' names."""
    for base in rows.BASES:
        for checkpointing in (False, True):
            keys = {(r.contestant, r.share, r.position) for r in rows.rows(base, checkpointing)}
            missing = set(memory_counts.ROWS) - keys
            assert missing == set() or (base == "bf16" and missing == {memory_counts.ROWS[2]})

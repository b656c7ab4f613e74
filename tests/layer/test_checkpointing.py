"""Laws of the frozen prefix: no gradient, no checkpoint and no FLOP below the lowest open layer."""

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import ila
from ila.models.blocks import find_blocks, frozen_blocks
from ila.models.checkpointing import PrefixAware

BLOCKS, WIDTH, INNER, RANK = 8, 32, 48, 4
CHECKPOINTED = [pytest.param(False, id="non-reentrant"), pytest.param(True, id="reentrant")]
HOW = [pytest.param(None, id="no checkpoints"), *CHECKPOINTED]
ids = torch.arange(24).mul(17).remainder(64).view(2, 12)
M = ids.numel()


@pytest.fixture(autouse=True)
def names_of_transformers():
    """Let PEFT ask transformers by a name that transformers is renaming."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated")
        yield


def make(tiny, kind: str = "attached", open_: Callable[[int, str], bool] | None = None, **changes):
    """Eight blocks in fp64, every linear layer adapted; `open_` of block and name is the mask."""
    options = {"num_hidden_layers": BLOCKS, "attention_dropout": 0.0, **changes}
    base = tiny.base(**options)
    model = getattr(tiny, kind)(tiny.config(target_modules="all-linear"), base)
    if open_ is not None:
        mask(tiny, model, open_)
    return model.train()


def mask(tiny, model, open_):
    ila.apply_mask(model, tiny.mask(model, lambda _, name: not open_(block_of(name), name)))


def block_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def last_half(block: int, name: str) -> bool:
    return block >= BLOCKS // 2


def only(wanted: int, part: str) -> Callable[[int, str], bool]:
    return lambda block, name: block == wanted and name.endswith(part)


def checkpoint(model, how: bool | None):
    if how is not None:
        ila.gradient_checkpointing(model, use_reentrant=how)
    return model


def step(model) -> tuple[int, dict[str, Tensor]]:
    """FLOPs of one backward, and loss and gradients by name."""

    def addmm_(c_shape, a_shape, b_shape, **_):  # torch counts addmm, but not addmm_
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})
    with counter:
        loss.backward()
    result = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return counter.get_total_flops(), {"loss": loss.detach(), **result}


@contextmanager
def block_runs(model):
    """The blocks whose forward runs while this is open, recomputations included."""
    runs: list[int] = []
    layers = find_blocks(model).layers
    handles = [
        block.mlp.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
        for i, block in enumerate(layers)
    ]
    yield runs
    for handle in handles:
        handle.remove()


def recomputed(model) -> list[int]:
    """Blocks that backward runs again."""
    with block_runs(model) as runs:
        step(model)
    return sorted(set(runs[BLOCKS:]))


@pytest.mark.parametrize("how", HOW)
def test_the_last_half_costs_at_most_half_of_the_backward(how, tiny):
    plain, _ = step(checkpoint(make(tiny), how))
    half, _ = step(checkpoint(make(tiny, open_=last_half), how))
    assert half <= 0.50 * plain


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_plain_peft_pays_for_the_prefix(how, tiny):
    """The baseline that the others are measured by: without this, they could not fail."""
    config = tiny.config(target_modules=r".*layers\.[4567]\..*_proj")
    peft = tiny.plain(config, tiny.base(num_hidden_layers=BLOCKS)).train()
    peft.activation_checkpointing_enable({"use_reentrant": how})
    flops, _ = step(peft)
    assert flops > 0.8 * step(checkpoint(make(tiny), how))[0]
    assert recomputed(peft) == list(range(BLOCKS))
    ila.convert(peft)
    assert step(peft)[0] <= 0.50 * step(checkpoint(make(tiny), how))[0]
    assert recomputed(peft) == list(range(BLOCKS // 2, BLOCKS))


@pytest.mark.parametrize("how", CHECKPOINTED)
@pytest.mark.parametrize(
    "open_",
    [
        pytest.param(lambda block, name: True, id="all"),
        pytest.param(last_half, id="last half"),
        pytest.param(lambda block, name: block % 3 == 2, id="scattered"),
        pytest.param(only(4, "down_proj"), id="one down_proj"),
        pytest.param(only(0, "q_proj"), id="the lowest layer"),
        pytest.param(only(7, "down_proj"), id="the highest layer"),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_path(how, open_, tiny):
    _, expected = step(make(tiny, open_=open_))
    _, found = step(checkpoint(make(tiny, open_=open_), how))
    tiny.assert_equal(found, expected)  # the same operations in the same order: the same bits
    _, reference = step(adapted_by_peft(tiny, make(tiny, open_=open_)))
    tiny.assert_close(found, reference)


def adapted_by_peft(tiny, ours):
    """Plain PEFT on the open layers of a model of ours, with the same weights."""
    held = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    targets = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in held}
    config = tiny.config(target_modules=sorted(targets))
    peft = tiny.plain(config, tiny.base(num_hidden_layers=BLOCKS)).train()
    own = {n: p for n, p in peft.named_parameters() if "lora_" in n}
    assert set(own) == set(held)
    for name, parameter in own.items():
        parameter.data.copy_(held[name].data)
    return peft


@pytest.mark.parametrize("block", [2, 7])
def test_a_down_proj_alone_needs_no_backward_of_its_attention(block, tiny):
    flops, _ = step(make(tiny, open_=only(block, "down_proj")))
    above, _ = step(make(tiny, open_=only(BLOCKS - 1, "down_proj")))
    one_block = step(make(tiny, open_=only(5, "down_proj")))[0]
    one_block -= step(make(tiny, open_=only(6, "down_proj")))[0]
    # u = dy B, dB = dyᵀ t, dA = uᵀ x, and what lies above: head and whole blocks.
    own = 2 * M * RANK * (2 * WIDTH + INNER)
    head = 2 * M * WIDTH * 64
    assert above == own + head
    assert flops == own + head + (BLOCKS - 1 - block) * one_block


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_checkpoints_follow_the_mask(how, tiny):
    model = checkpoint(make(tiny), how)
    assert recomputed(model) == list(range(BLOCKS))
    mask(tiny, model, last_half)
    assert recomputed(model) == [4, 5, 6, 7]
    mask(tiny, model, lambda block, name: block in (2, 6))
    assert recomputed(model) == [2, 3, 4, 5, 6, 7]
    # By what requires grad and not by the mask alone: a weight trained in full below it.
    norm = find_blocks(model).layers[1].input_layernorm.weight.requires_grad_()
    assert recomputed(model) == [1, 2, 3, 4, 5, 6, 7]
    step(model)
    assert norm.grad is not None
    assert ila.gradient_checkpointing(model, enable=False) == 0
    assert recomputed(model) == []


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_nothing_in_the_prefix_requires_grad(how, tiny):
    model = checkpoint(make(tiny, open_=last_half), how)
    seen = {}
    blocks = find_blocks(model)
    for position, block in enumerate(blocks.layers):
        block.register_forward_hook(lambda m, i, out, at=position: seen.update({at: out}))
    blocks.decoder.embed_tokens.register_forward_hook(lambda m, i, out: seen.update({-1: out}))
    model(input_ids=ids)
    assert {at for at, out in seen.items() if out.requires_grad} == {4, 5, 6, 7}
    assert all(seen[at].grad_fn is None for at in range(-1, 4))


def test_frozen_blocks_are_counted_by_what_requires_grad(tiny):
    model = make(tiny)
    decoder, layers = find_blocks(model)
    assert len(layers) == BLOCKS
    assert frozen_blocks(model) == 0
    mask(tiny, model, last_half)
    assert frozen_blocks(model) == 4
    decoder.norm.weight.requires_grad_()  # above every block
    model.get_output_embeddings().weight.requires_grad_()
    assert frozen_blocks(model) == 4
    decoder.embed_tokens.weight.requires_grad_()
    assert frozen_blocks(model) == 0
    model.requires_grad_(False)
    assert frozen_blocks(model) == BLOCKS
    layers[3].post_attention_layernorm.weight.requires_grad_()
    assert frozen_blocks(model) == 3
    assert frozen_blocks(nn.Linear(1, 1)) == 0


def test_trained_embeddings_get_their_gradient_through_the_prefix(tiny):
    config = tiny.config(target_modules=["down_proj"], modules_to_save=["embed_tokens"])
    found = {}
    for how in (None, False, True):
        model = tiny.attached(config, tiny.base(num_hidden_layers=3, tie_word_embeddings=False))
        assert frozen_blocks(model) == 0
        _, found[how] = step(checkpoint(model.train(), how))
    assert any("embed_tokens" in name for name in found[None])
    tiny.assert_equal(found[False], found[None])
    tiny.assert_equal(found[True], found[None])


@pytest.mark.parametrize("how", CHECKPOINTED)
@pytest.mark.parametrize("first", ["checkpointing", "attach"])
def test_turned_on_by_transformers_peft_and_trl(how, first, tiny):
    """In whatever order: each of them asks for the input's gradient, some of them twice."""
    base = tiny.base(num_hidden_layers=BLOCKS)
    config = tiny.config(target_modules="all-linear")
    if first == "checkpointing":
        base.enable_input_require_grads()
        base.activation_checkpointing_enable({"use_reentrant": how})
        model = tiny.attached(config, base)
    else:
        model = tiny.attached(config, base)
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": how})
    mask(tiny, model.train(), last_half)
    assert recomputed(model) == [4, 5, 6, 7]
    assert not find_blocks(model).decoder.embed_tokens._forward_hooks
    ila.restore(model)
    # PEFT's own behaviour again, its cost included.
    assert recomputed(model) == list(range(BLOCKS))
    assert find_blocks(model).decoder.embed_tokens._forward_hooks
    leftovers = [m for m in model.modules() for v in vars(m).values() if isinstance(v, PrefixAware)]
    assert not leftovers


def test_restore_leaves_a_model_that_never_asked_without_the_hook(tiny):
    base = tiny.base()
    before = set(vars(base))
    model = tiny.attached(tiny.config(), base)
    assert set(vars(base)) > before
    ila.restore(model)
    added = {name for name in set(vars(base)) - before if "peft" not in name}
    assert not added
    assert not base.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own_checkpointing(copied, tiny):
    config = tiny.config(target_modules="all-linear")
    model = tiny.attached(config, tiny.base(num_hidden_layers=BLOCKS)).train()
    mask(tiny, model, last_half)
    twin = copied(checkpoint(model, True))
    assert recomputed(twin) == [4, 5, 6, 7]
    ila.gradient_checkpointing(twin, enable=False)
    assert recomputed(twin) == [] and recomputed(model) == [4, 5, 6, 7]


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_parameters_that_a_forward_does_not_use(how, tiny):
    """An adapter that is not active, but trainable, in a block below the first that is."""
    model = checkpoint(make(tiny, open_=last_half), how)
    _, expected = step(model)
    unused = nn.Linear(1, 1, dtype=torch.float64)
    find_blocks(model).layers[1].spare = unused
    _, found = step(model)
    tiny.assert_equal(found, expected)
    assert unused.weight.grad is None


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_no_checkpoint_is_taken_where_no_gradient_is(how, tiny):
    model = checkpoint(make(tiny), how)
    with torch.no_grad():
        quiet = model(input_ids=ids).logits
    assert not quiet.requires_grad
    with model.disable_adapter():  # the reference of preference training
        assert not model(input_ids=ids).logits.requires_grad


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_trainer_pays_for_the_open_half_only(how, tiny, tmp_path):
    losses, runs = {}, {}
    for name, on in (("checkpoints", True), ("plain", False)):
        model = make(tiny, open_=last_half)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, gradient_checkpointing=on, report_to="none", use_cpu=True,
            gradient_checkpointing_kwargs={"use_reentrant": how} if on else None,
            disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(model, arguments, train_dataset=rows)
        with block_runs(model) as seen:
            trainer.train()
        losses[name] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        runs[name] = {block: seen.count(block) for block in range(BLOCKS)}
    assert len(losses["plain"]) == 3 and losses["checkpoints"] == losses["plain"]
    assert runs["plain"] == dict.fromkeys(range(BLOCKS), 3)
    assert runs["checkpoints"] == {block: 6 if block >= 4 else 3 for block in range(BLOCKS)}


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="GradientCheckpointingLayer, got Linear"):
        ila.gradient_checkpointing(nn.Linear(2, 2))

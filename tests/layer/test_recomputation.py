"""A block is run again along the path of its forward, whatever begins or ends in between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules import module as modules
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ila
from ila.models.blocks import find_blocks

ROWS = 12  # of 7 tokens: more than the 64 below which calls stay apart on a CPU
NOTHING = nullcontext()
REENTRANT = [pytest.param(False, id="non-reentrant"), pytest.param(True, id="reentrant")]


def seen(*args, **kwargs) -> None:
    """A hook that looks and changes nothing."""


def parts(model: nn.Module, *names: str) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if n.rpartition(".")[2] in names]


def counting(model):
    return FlopCounterMode(display=False)


def profiling(model):
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@contextmanager
def hook_of_all(kind: str) -> Iterator[None]:
    handle = getattr(modules, f"register_module_{kind}")(seen)
    try:
        yield
    finally:
        handle.remove()


def pre_hook_of_all(model):
    return hook_of_all("forward_pre_hook")


def forward_hook_of_all(model):
    return hook_of_all("forward_hook")


def backward_hook_of_all(model):
    return hook_of_all("full_backward_hook")


def backward_pre_hook_of_all(model):
    return hook_of_all("full_backward_pre_hook")


def hooks_of(*names: str) -> Callable:
    @contextmanager
    def enter(model):
        kinds = ("forward_pre_hook", "forward_hook", "full_backward_hook")
        found = [(m, kind) for m in parts(model, *names) for kind in kinds]
        handles = [getattr(m, f"register_{kind}")(seen) for m, kind in found]
        yield
        for handle in handles:
            handle.remove()

    enter.__name__ = f"hooks_of_{'_'.join(names)}"
    return enter


@contextmanager
def replaced_forwards(model):
    found = parts(model, "base_layer", "q_proj", "down_proj")
    for module in found:
        module.forward = module.forward
    yield
    for module in found:
        del module.forward


def autocast(model):
    return torch.autocast("cpu", dtype=torch.bfloat16)


def without_gradients(model):
    return torch.no_grad()


def saved_elsewhere(model):
    return save_on_cpu()


@contextmanager
def a_compiled_function(model):
    torch._dynamo.reset()
    torch.compile(torch.sin, backend="eager")(torch.ones(3))
    yield


CHANGES = [
    counting,
    profiling,
    pre_hook_of_all,
    forward_hook_of_all,
    backward_hook_of_all,
    backward_pre_hook_of_all,
    hooks_of("q_proj", "up_proj"),
    hooks_of("k_proj", "gate_proj"),
    hooks_of("down_proj", "o_proj"),
    hooks_of("base_layer"),
    hooks_of("default"),  # the modules A, B and dropout
    hooks_of("act_fn"),
    replaced_forwards,
    saved_elsewhere,
    a_compiled_function,
]
MODES = [autocast, without_gradients]


def model_of(tiny, make: str = "attached", dropout: float = 0.0, **changes) -> nn.Module:
    config = tiny.config(target_modules="all-linear", lora_dropout=dropout)
    return getattr(tiny, make)(config, tiny.base(**changes)).train()


def step(tiny, model, forward=NOTHING, backward=NOTHING) -> dict[str, torch.Tensor]:
    """Logits and gradients, with something entered around forward alone or backward alone."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with forward:
        logits = model(input_ids=tiny.tokens(ROWS)).logits
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    with backward:
        logits.backward(dy.to(logits.dtype))
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **named}


# torch says of a hook for all modules which ones it cannot serve.
@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("during", ["forward", "backward"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_begins_or_ends_in_between(tiny, dropout, use_reentrant, change, during):
    model = model_of(tiny, dropout=dropout)
    expected = step(tiny, model, **{during: change(model)})
    if not dropout:
        tiny.assert_close(expected, step(tiny, model))
    ila.gradient_checkpointing(model, use_reentrant=use_reentrant)
    tiny.assert_close(step(tiny, model, **{during: change(model)}), expected)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_a_mode_around_backward_alone_changes_nothing(tiny, use_reentrant, mode):
    model = model_of(tiny, dtype=torch.float32)
    expected = step(tiny, model, backward=mode(model))
    ila.gradient_checkpointing(model, use_reentrant=use_reentrant)
    tiny.assert_close(step(tiny, model, backward=mode(model)), expected, tolerance=1e-6)


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_autocast_around_forward_alone_holds_for_the_recomputation(tiny, use_reentrant):
    model = model_of(tiny, dtype=torch.float32)
    expected = step(tiny, model, forward=autocast(model))
    ila.gradient_checkpointing(model, use_reentrant=use_reentrant)
    tiny.assert_close(step(tiny, model, forward=autocast(model)), expected, tolerance=1e-6)


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_evaluation_mode_in_between(tiny, use_reentrant):
    """Without dropout the mode decides nothing, and backward is that of training."""
    model = model_of(tiny)
    expected = step(tiny, model)
    ila.gradient_checkpointing(model, use_reentrant=use_reentrant)

    @contextmanager
    def evaluating():
        model.eval()
        yield
        model.train()

    tiny.assert_close(step(tiny, model, backward=evaluating()), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_two_forwards_that_differ_before_one_backward(tiny):
    """Each recomputation follows its own forward and not the last one."""
    model = model_of(tiny)
    ids = [tiny.tokens(ROWS), tiny.tokens(ROWS).roll(1, 1)]

    def both(entered):
        model.zero_grad(set_to_none=True)
        first = model(input_ids=ids[0]).logits
        with entered:
            second = model(input_ids=ids[1]).logits
        (first.sin().sum() + second.sin().sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = both(NOTHING)
    ila.gradient_checkpointing(model)
    hooked = hooks_of("base_layer", "q_proj", "down_proj")
    tiny.assert_close(both(hooked(model)), expected)


@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("change", [counting, pre_hook_of_all, profiling], ids=lambda c: c.__name__)
def test_a_checkpoint_of_ones_own(tiny, change, use_reentrant):
    """Nothing is recorded there; what watches every module still changes no path."""
    model = model_of(tiny)
    block = find_blocks(model).layers[0]
    x = torch.randn(ROWS, 7, 32, dtype=torch.float64, requires_grad=True)
    angles = torch.zeros(1, 7, 8, dtype=torch.float64)
    position = (angles.cos(), angles.sin())

    def run(way, entered=NOTHING):
        model.zero_grad(set_to_none=True)
        x.grad = None
        y = way(lambda x: block(x, position_embeddings=position), x)
        with entered:
            y.sin().sum().backward()
        found = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "x": x.grad.clone(), **found}

    expected = run(lambda function, x: function(x))
    checkpointed = run(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant), change(model))
    tiny.assert_close(checkpointed, expected)


def test_a_hook_for_all_modules_that_changes_what_down_proj_gets(tiny):
    """Its input is not made again from gate and up, which would undo the change."""
    model = model_of(tiny)

    def half(module, args):
        return (args[0] / 2, *args[1:]) if module in parts(model, "down_proj") else None

    def run():
        handle = modules.register_module_forward_pre_hook(half)
        try:
            return step(tiny, model)
        finally:
            handle.remove()

    found = run()
    ila.restore(model)
    tiny.assert_close(found, run())

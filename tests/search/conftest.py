"""Models small enough to search in half a second, and the ways to break off what trains them."""

import gc
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import ila
from ila.search.learn import SearchConfig, learn_mask

WORDS = 24


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Run on the CPU, where the same sums give the same bits.

    One thread: matrices of 16 by 16 gain nothing from more, and a busy machine loses ten times.

    Each training collects garbage, 0.3 s over the modules imported; frozen, they are left out.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


class Toy(nn.Module):
    """A language model without float32 inside: Llama's norms and loss round to it, whatever dtype.

    input_ids, labels (rows, length) -> loss (), the mean over the labels that are not -100.
    """

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.lower = nn.Linear(width, 2 * width, bias=False)
        self.upper = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict:
        hidden = self.embed(input_ids)
        hidden = hidden + self.upper(torch.tanh(self.lower(hidden)))
        logits = self.head(hidden)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


@pytest.fixture
def make_toy() -> Callable[..., PeftModel]:
    """Return a maker of float64 models of three adapted layers; A and B are both random."""

    def make(**changes) -> PeftModel:
        options = {"r": 3, "lora_alpha": 6, "target_modules": ["lower", "upper", "head"]}
        torch.manual_seed(3)
        base = Toy().double()
        return ila.attach(base, LoraConfig(**options | {"init_lora_weights": False} | changes))

    return make


@pytest.fixture
def make_llama(tiny_model_folder) -> Callable[..., PeftModel]:
    """Return a maker of float32 Llamas of 14 adapted layers, with dropout; always the same one."""

    def make(adapter_name: str = "default", **changes) -> PeftModel:
        base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
        options = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
        torch.manual_seed(5)
        config = LoraConfig(**options | {"target_modules": "all-linear"} | changes)
        return ila.attach(base, config, adapter_name=adapter_name)

    return make


def make_rows(count: int = 10, length: int = 7, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows that can be learned: each token but the first two is the one before it plus one."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3, WORDS)]
        ids += [3 + (ids[0] - 3 + step) % (WORDS - 3) for step in range(1, length)]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Return ten rows: five steps of two make an epoch."""
    return make_rows()


@pytest.fixture
def search() -> Callable:
    """Return `learn_mask` with a configuration of few steps."""

    def run(model, rows, *, output_dir=None, resume=False, **changes):
        options = {"stage1_steps": 8, "stage2_steps": 7, "batch_size": 2, "epsilon": 0.0}
        options |= {"learning_rate": 1e-2, "save_every": 3, "stability_window": 2}
        config = SearchConfig(**options | changes)
        return learn_mask(model, rows, config, output_dir=output_dir, resume=resume, progress=False)

    return run


class Killed(BaseException):
    """What a kill looks like from inside: nothing that catches `Exception` sees it."""


@pytest.fixture
def break_off(monkeypatch) -> Callable:
    """Return a switch: the given call of a function, from 1, raises, before or after its work."""

    def arm(owner, name: str, call: int, *, after: bool = False, error=Killed) -> None:
        calls = 0
        original = getattr(owner, name)

        def broken(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls < call:
                return original(*args, **kwargs)
            monkeypatch.setattr(owner, name, original)
            if after:
                original(*args, **kwargs)
            raise error

        monkeypatch.setattr(owner, name, broken)

    return arm


@pytest.fixture
def killed() -> type[BaseException]:
    """Return the exception that `break_off` raises."""
    return Killed


@pytest.fixture
def trace() -> Callable[[nn.Module], dict]:
    """Return what the search must leave as it was: flags, parameters' names, gates, patches."""

    def take(model: nn.Module) -> dict:
        return {
            "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
            "buffers": [name for name, _ in model.named_buffers()],
            "modules": [(name, type(module)) for name, module in model.named_modules()],
            "gates": [m.gate("default") for m in model.modules() if hasattr(m, "lora_S")],
            "forward": [name for name, m in model.named_modules() if "forward" in vars(m)],
            "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        }

    return take

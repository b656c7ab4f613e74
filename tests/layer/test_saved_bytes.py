"""What a step keeps for backward at the shapes of Llama-2-7B; and that the count is right."""

import pytest
import torch

import ila
from benchmarks.memory.kept import saved_bytes
from benchmarks.memory.true_size import build
from benchmarks.saved_bytes import GIB, contestants, count

TOKENS = (4, 1024)
ROWS = contestants()


def gib(row: str) -> float:
    return sum(count(ROWS[row](build("llama-2-7b")), *TOKENS).values()) / GIB


@pytest.mark.parametrize(("row", "known"), [("PEFT", 34.2), ("PEFT, dropout", 51.4)])
def test_the_count_reproduces_what_is_known_of_peft(row, known):
    assert round(gib(row), 1) == known


@pytest.mark.parametrize(
    ("row", "most"),
    [
        ("ours, all open", 16.2),
        ("ours, dropout", 16.5),
        ("ours, 30 % scattered (0)", 15.5),
        ("ours, 30 % at the top", 5.5),
    ],
)
def test_ours_keeps_at_most(row, most):
    assert gib(row) <= most


def test_fake_tensors_are_counted_like_real_ones(tiny):
    ids = tiny.tokens(4, 24)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0  # a fake model gets an explicit mask; so does a padded batch

    def real_and_fake(closed):
        counts = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                base = tiny.base(dtype=torch.bfloat16).to(device)
            model = tiny.attached(tiny.config(target_modules="all-linear"), base)
            close = tiny.mask(model, closed)
            ila.apply_mask(model, close)
            if device == "meta":
                counts.append(count(model, *ids.shape))
                continue
            counts.append(
                saved_bytes(model, lambda m=model: m(ids, labels=ids, attention_mask=padded).loss)
            )
        return counts

    for closed in (lambda i, name: False, lambda i, name: i % 3 > 0):
        real, fake = real_and_fake(closed)
        assert real == fake
        assert real["mlp"] > 0
